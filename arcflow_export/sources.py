"""A directory or hub id -> a local directory that holds the wanted files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SourceError

#: Only weights that cannot run code, and the text files beside them, are ever downloaded.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")
#: A name that ends so is meant as a file here, although the hub's rules would allow it.
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
    """A checkpoint on this machine; `revision` is the hub's commit, None for a directory."""

    name: str
    path: Path
    revision: str | None


def resolve(location: Location, what: str, patterns: tuple[str, ...] = HUB_PATTERNS) -> Resolved:
    """Find a checkpoint on this machine, or fetch it from the hub into the shared cache.

    Args:
        location: a directory, or a hub id such as `black-forest-labs/FLUX.1-dev`.
        what: what it is, for messages ("base checkpoint", "adapter", "LoRA").
        patterns: what to fetch from the hub, in or below the subfolder.

    Raises:
        SourceError: there is no such directory, or the hub could not be reached or refused.
    """
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
            f"{what}: {location.name!r} is no file or directory here, nor a hub id of the form 'owner/name'; "
            "check the spelling"
        )
    prefix = f"{location.subfolder}/" if location.subfolder else ""
    root = _download(location, [prefix + p for p in patterns], what)
    path = root / location.subfolder if location.subfolder else root
    if not path.is_dir():
        raise SourceError(f"{what}: {location.name} on the hub has no subfolder {location.subfolder!r}")
    return Resolved(f"{location.name}/{location.subfolder}" if location.subfolder else location.name, path, root.name)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.endswith(_FILES)


def _download(location: Location, patterns: list[str], what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(
                location.name,
                revision=location.revision,
                allow_patterns=patterns,
                # The hub's "*" also matches "/": without this, a root's patterns fetch every subfolder.
                ignore_patterns=None if any("/" in p for p in patterns) else ["*/*"],
                local_files_only=location.offline,
            )
        )
    except GatedRepoError:
        raise SourceError(
            f"{what}: {location.name} is gated; accept its licence on the hub and log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{what}: {location.name} has no revision {location.revision!r}") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{what}: {location.name!r} is neither a directory here nor a repository on the hub; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from None
    except Exception as e:  # the hub client raises its HTTP library's errors as they are
        if location.offline:
            revision = f" at revision {location.revision!r}" if location.revision else ""
            raise SourceError(
                f"{what}: {location.name!r} is no directory here and not in the hub's cache{revision}; "
                "check the spelling, or leave out --offline to fetch it"
            ) from None
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise SourceError(
            f"{what}: {location.name!r} is no directory here and the hub could not be reached ({reason}); "
            "check the path or the network"
        ) from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        SourceError: the file is missing or holds no JSON object.
    """
    if not path.is_file():
        raise SourceError(f"{what}: {path} is missing")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise SourceError(f"{what}: {path} is not valid JSON ({e})") from None
    if not isinstance(data, dict):
        raise SourceError(f"{what}: {path} must hold a JSON object, got {type(data).__name__}")
    return data
