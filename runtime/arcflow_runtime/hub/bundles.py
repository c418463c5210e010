"""Find a bundle: a directory, or a hub id such as `owner/name@revision` -> a local directory, downloaded if necessary.

A bundle's files must lie inside its directory (rule B4), and those of the hub's cache are links out of it. So the
downloaded files are hard-linked into a directory of their own, inside the cache's folder of the repository. They take
no further space, and `hf cache rm` removes them together.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_runtime.disk.bundle import MAX_MANIFEST_BYTES, Bundle, check_name, read_manifest
from arcflow_runtime.disk.files import locked, sha256_file, whole_directory
from arcflow_runtime.disk.manifest import MANIFEST, Manifest
from arcflow_runtime.errors import SourceError
from arcflow_runtime.installing import install_command

if TYPE_CHECKING:
    from arcflow_runtime.hub.repository import Repository

_WHAT = "bundle"
#: The part of a hub id before or after the slash; the client checks the hub's finer rules.
_ID_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"({_ID_PART})/({_ID_PART})(?:@(.+))?")
#: Folder of the bundles in the cache's folder of a repository.
_FOLDER = "bundles"


@dataclass(frozen=True)
class FoundBundle:
    """A bundle on this machine: its directory, a short name, and the hub's commit; None for a plain directory."""

    path: Path
    name: str
    commit: str | None = None


def find_bundle(given: str | Path, revision: str | None = None, offline: bool = False) -> FoundBundle:
    """The directory of a bundle. A path that exists is used as it is; a hub id is downloaded once for each commit.

    An interrupted download continues where it stopped. Every file of a download is compared with its SHA-256 in the
    manifest. If the hub cannot be reached, the commit that the cache last knew is used.

    Args:
        given: a directory, `owner/name` or `owner/name@revision`.
        revision: branch, tag or commit, in place of `@revision`; None is the default branch.
        offline: use the hub's cache only, as HF_HUB_OFFLINE=1 does.

    Raises:
        SourceError: the hub refuses or cannot be reached, a file does not match its SHA-256, the disk is full, or there
            is a revision for a directory.
    """
    path, text = Path(given).expanduser(), Path(given).as_posix()
    match = _ID.fullmatch(text)
    if path.exists() or match is None:
        if revision is not None:
            is_what = "a directory here" if path.exists() else "not a hub id of the form 'owner/name'"
            raise SourceError(f"bundle: {text} is {is_what}, so it has no revision {revision!r}; leave that out")
        # Without following links, so that a link can give a bundle another name.
        return FoundBundle(path, Path(os.path.abspath(path)).name)
    owner, name, written = match.groups()
    if revision is not None and written is not None:
        raise SourceError(f"bundle: {text} names a revision, and {revision!r} is given too; give one of them")
    return _download(f"{owner}/{name}", name, revision or written, offline)


def is_hub_id(text: str) -> bool:
    """True if `text` has the form `owner/name`."""
    match = _ID.fullmatch(text)
    return match is not None and match.group(3) is None


def need_client(text: str) -> None:
    """Check that the hub's client is installed.

    Raises:
        SourceError: it is not; the message begins with `text`.
    """
    if find_spec("huggingface_hub") is None:
        raise SourceError(f"{text}; run: {install_command('arcflow_runtime.hub')}")


def _download(repo_id: str, name: str, revision: str | None, offline: bool) -> FoundBundle:
    need_client(f"bundle: {repo_id!r} is not a directory here, and a bundle on the hub needs the hub's client")
    from arcflow_runtime.hub.repository import open_repository

    repository = open_repository(repo_id, revision, offline, _WHAT)
    folder = repository.storage / _FOLDER / repository.revision
    found = FoundBundle(folder, name, repository.revision)
    if folder.is_dir():
        return found
    manifest = _read_manifest(repository)
    repository.fetch(list(manifest.files))
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, lambda text: SourceError(f"bundle: {text}"), wait=True):
        if not folder.is_dir():  # another process may have made it meanwhile
            _check_hashes(repository, manifest)
            with whole_directory(folder) as partial:
                for file in (MANIFEST, *manifest.files):
                    _link(repository.root / file, partial / file)
                Bundle.open(partial)
    return found


def _read_manifest(repository: Repository) -> Manifest:
    """Download the manifest alone, and compare its list of files with the hub's."""
    where = f"bundle: {repository.name} at {repository.revision[:12]} on the hub"
    if MANIFEST not in repository.sizes:
        raise SourceError(f"{where} has no {MANIFEST}, so it is not a bundle; push one with `arcflow push`")
    if repository.sizes[MANIFEST] > MAX_MANIFEST_BYTES:
        raise SourceError(
            f"{where}: {MANIFEST} must have at most {MAX_MANIFEST_BYTES} bytes, got {repository.sizes[MANIFEST]}; "
            "push the bundle again"
        )
    manifest, _ = read_manifest(repository.read(MANIFEST).parent)
    for name, entry in manifest.files.items():
        check_name(name, repository.root)
        size = repository.sizes.get(name)
        if size is None and repository.offline is None:
            raise SourceError(f"{where} lacks {name}, which its manifest lists; push the bundle again")
        # Offline, a file that is not in the cache has no size or size 0; `fetch` says so.
        if size not in (None, 0, entry.bytes):
            raise SourceError(f"{where}: {name} must have {entry.bytes} bytes, got {size}; push the bundle again")
    return manifest


def _check_hashes(repository: Repository, manifest: Manifest) -> None:
    """Compare every downloaded file with the manifest; one that differs is removed from the cache."""
    from tqdm import tqdm

    total = sum(entry.bytes for entry in manifest.files.values())
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, delay=1, disable=None) as bar:
        for name, entry in manifest.files.items():
            file = repository.root / name
            if sha256_file(file, bar.update) == entry.sha256:
                continue
            blob = file.resolve()
            file.unlink()
            blob.unlink(missing_ok=True)
            raise SourceError(
                f"bundle: {name} of {repository.name} does not match its SHA-256 in the manifest and was removed from "
                "the cache; run the same command again, and if that fails too, the bundle on the hub is damaged: "
                "push it again"
            )


def _link(file: Path, to: Path) -> None:
    """A hard link to the contents of `file`, or a copy on a file system without hard links."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)
