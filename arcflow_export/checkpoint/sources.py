"""Find a checkpoint: a directory or hub id -> a local directory, with the needed files downloaded if necessary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcflow_export.errors import SourceError

if TYPE_CHECKING:
    from arcflow_runtime.hub.repository import Repository

#: A name with one of these endings means a local file, although the hub's rules allow it as an id.
_FILES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is: a directory or hub id, with an optional subfolder and revision."""

    name: str
    subfolder: str | None = None
    revision: str | None = None
    offline: bool = False


@dataclass(frozen=True)
class Resolved:
    """A checkpoint on this machine; `revision` is the hub's commit, or None for a plain directory."""

    name: str
    path: Path
    revision: str | None


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint on the hub; `names` are relative to its subfolder.

    `read` downloads one small file and returns its local path. `where` and `what` name the checkpoint in messages.
    """

    what: str
    where: str
    names: frozenset[str]
    read: Callable[[str], Path]

    def within(self, folder: str) -> set[str]:
        """Names of the files directly inside `folder`; "" is the top folder."""
        return {name.rpartition("/")[2] for name in self.names if name.rpartition("/")[0] == folder}


#: Chooses the files to download from a listing; `layout` has one such function for each kind of checkpoint.
Choose = Callable[[Listing], list[str]]


@dataclass(frozen=True)
class RemoteFile:
    """One file on the hub: its size, and how many of its bytes are already in the cache."""

    name: str
    bytes: int
    cached_bytes: int


@dataclass(frozen=True)
class Download:
    """What `resolve` would download; `files` is empty for a local directory."""

    name: str
    revision: str | None
    files: tuple[RemoteFile, ...] = ()

    @property
    def bytes(self) -> int:
        """Total size of all files."""
        return sum(f.bytes for f in self.files)

    @property
    def cached_bytes(self) -> int:
        """How many of `bytes` are already in the hub's cache."""
        return sum(f.cached_bytes for f in self.files)


def resolve(location: Location, what: str, choose: Choose, weights: bool = True) -> Resolved:
    """Find a checkpoint on this machine, or download it from the hub into the shared cache.

    Files that are already in the cache are not downloaded again, and an interrupted file continues where it stopped.

    Args:
        location: a directory, or a hub id such as `black-forest-labs/FLUX.1-dev`.
        what: the kind of checkpoint, for messages ("base checkpoint", "adapter", "LoRA").
        choose: picks the files to download from the hub.
        weights: False downloads configs and tokenizers only.

    Raises:
        SourceError: the directory does not exist, the hub cannot be reached or refuses, a download is interrupted, or
            the disk is full.
    """
    if (found := _local(location, what)) is not None:
        return found
    repository, names = _chosen(location, what, choose)
    repository.fetch([n for n in names if weights or not n.endswith(".safetensors")])
    return Resolved(_full_name(location), repository.root / (location.subfolder or ""), repository.revision)


def measure(location: Location, what: str, choose: Choose) -> Download:
    """List what `resolve` would download, with sizes; downloads only the small index files that this needs.

    Args:
        location: as for `resolve`.
        what: as for `resolve`.
        choose: as for `resolve`.

    Raises:
        SourceError: as for `resolve`.
    """
    if (found := _local(location, what)) is not None:
        return Download(found.name, None)
    repository, names = _chosen(location, what, choose)
    files = tuple(RemoteFile(n, repository.sizes[n], repository.cached_bytes(n)) for n in names)
    return Download(_full_name(location), repository.revision, files)


def _local(location: Location, what: str) -> Resolved | None:
    """The local directory or file that `location` names, or None if it is a hub id."""
    if not location.name:
        raise SourceError(f"{what}: the name is empty; give a directory or a hub id of the form 'owner/name'")
    local = Path(location.name).expanduser()
    if local.exists():
        path = local / location.subfolder if location.subfolder else local
        if not path.exists():
            raise SourceError(f"{what}: {local} has no subfolder {location.subfolder!r}")
        return Resolved(local.name or str(local), path, None)
    if not _is_hub_id(location.name):
        raise SourceError(
            f"{what}: {location.name!r} is not a file or directory here, nor a hub id of the form 'owner/name'; "
            "check the spelling"
        )
    return None


def _chosen(location: Location, what: str, choose: Choose) -> tuple[Repository, list[str]]:
    """The opened repository, and the files to download by their full names in it."""
    from arcflow_runtime.hub.repository import open_repository

    repository = open_repository(location.name, location.revision, location.offline, what)
    prefix = f"{location.subfolder.strip('/')}/" if location.subfolder else ""
    names = frozenset(n.removeprefix(prefix) for n in repository.sizes if n.startswith(prefix))
    if not names:
        lacking = f"subfolder {location.subfolder!r}" if prefix else "files"
        raise SourceError(f"{what}: {location.name} on the hub has no {lacking}")
    listing = Listing(what, _full_name(location), names, lambda name: repository.read(prefix + name))
    return repository, [prefix + name for name in choose(listing)]


def _full_name(location: Location) -> str:
    return f"{location.name}/{location.subfolder}" if location.subfolder else location.name


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.endswith(_FILES)


def check_present(path: Path, what: str) -> None:
    """Check that `path` is a file.

    Raises:
        SourceError: it is missing, or is a link to a missing file, as in a hub cache that was cleaned by hand.
    """
    if path.is_symlink() and not path.exists():
        raise SourceError(
            f"{what}: {path} is a link to {os.readlink(path)}, which is missing; give the hub id without --offline "
            "to download it again"
        )
    if not path.is_file():
        raise SourceError(f"{what}: {path} is missing")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        SourceError: the file is missing or does not hold a JSON object.
    """
    check_present(path, what)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise SourceError(f"{what}: {path} is not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise SourceError(f"{what}: {path} must hold a JSON object, got {type(data).__name__}")
    return data
