"""Download files of one commit of a model on the hub into the hub's cache, with huggingface_hub's own client.

`hub.bundles` calls this, and the exporter for checkpoints. The client cannot continue a file after its process has
ended. So weights are downloaded under a fixed temporary name, and the next run continues where this one stopped. Files
that the hub serves through Xet are left to the client: it downloads their chunks from several servers at once, but
starts an interrupted file again. With HF_HUB_DISABLE_XET=1 those can be continued too.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.errors import SourceError

#: Weight files downloaded at the same time. One connection seldom uses the full bandwidth; more files at once leave
#: more incomplete files after an interruption.
_AT_ONCE = 4
_SHOWN = 3
#: Seconds that `check_access` waits for an answer of the hub.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Repository:
    """A model at one commit: the size of every file by its name, and its folder `storage` in the hub's cache.

    `offline` is None if the hub may be contacted; otherwise it tells the user how to leave the offline mode.
    """

    name: str
    what: str
    requested: str | None
    revision: str
    offline: str | None
    storage: Path
    sizes: dict[str, int] = field(repr=False)

    @property
    def root(self) -> Path:
        """The cache folder that holds this commit's files under their own names."""
        return self.storage / "snapshots" / self.revision

    def cached_bytes(self, name: str) -> int:
        """How many bytes of a file are in the cache."""
        return self.sizes[name] if (self.root / name).is_file() else 0

    def read(self, name: str) -> Path:
        """The local path of one small file; downloads it if it is not in the cache.

        Raises:
            SourceError: as for `fetch`.
        """
        if not (self.root / name).is_file() and self.offline is None:
            from huggingface_hub import hf_hub_download

            with _explained(self.what, self.name, self.requested, self.offline, transfer=True):
                hf_hub_download(self.name, name, revision=self.revision)
        self.fetch([name])
        return self.root / name

    def fetch(self, names: list[str]) -> None:
        """Download the files that are not in the cache.

        Raises:
            SourceError: a file is missing while offline, the hub refused, the download was interrupted, or the disk is
                full.
        """
        missing = [name for name in names if not (self.root / name).is_file()]
        if not missing:
            return
        if self.offline is not None:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise SourceError(
                f"{self.what}: the hub's cache has only a part of {self.name}: {', '.join(missing[:_SHOWN])}{more} "
                f"missing in {self.root}; {self.offline} to download the rest"
            )
        self._check_space(missing)
        from huggingface_hub import snapshot_download

        with _explained(self.what, self.name, self.requested, self.offline, transfer=True):
            self._fetch_weights([name for name in missing if name.endswith(".safetensors")])
            # The client links the blobs that are there and downloads the rest.
            patterns = [glob.escape(name) for name in missing]
            snapshot_download(self.name, revision=self.revision, allow_patterns=patterns, tqdm_class=_bar())

    def _check_space(self, missing: list[str]) -> None:
        folder = next(p for p in (self.storage, *self.storage.parents) if p.exists())
        free = shutil.disk_usage(folder).free
        # The client's own temporary names have two dots; names with one are ours and will be continued.
        partial = [p for p in (self.storage / "blobs").glob("*.incomplete") if p.name.count(".") == 1]
        needed = sum(self.sizes[name] for name in missing) - sum(p.stat().st_size for p in partial)
        if free < needed:
            raise SourceError(
                f"{self.what}: {self.name} needs {needed / 1e9:.1f} GB more in the hub's cache, {self.storage.parent} "
                f"has {free / 1e9:.1f} GB free; free some space, or set HF_HOME to a folder on a larger disk"
            )

    def _fetch_weights(self, names: list[str]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            runs = [pool.submit(self._fetch_resumably, name, stop) for name in names]
            try:
                for run in as_completed(runs):
                    run.result()
            except BaseException:  # Ctrl-C too: the other threads must not continue for hours
                stop.set()
                for run in runs:
                    run.cancel()
                raise

    def _fetch_resumably(self, name: str, stop: threading.Event) -> None:
        """Download one file to the client's folder of blobs, continuing the partial file of an earlier run."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get, is_xet_available
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        url = hf_hub_url(self.name, name, revision=self.revision)
        found = get_hf_file_metadata(url)
        if not found.etag or found.size is None or (found.xet_file_data is not None and is_xet_available()):
            return
        blob = self.storage / "blobs" / found.etag
        partial = blob.with_name(f"{found.etag}.incomplete")
        lock = self.storage.parent / ".locks" / self.storage.name / f"{found.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the client takes the same lock, so no other process writes this file
            if blob.exists():
                return
            if partial.exists() and partial.stat().st_size > found.size:
                partial.unlink()
            with partial.open("ab") as f:
                before = f.tell()
                http_get(
                    url,
                    f,
                    resume_size=before,
                    headers=build_hf_headers(),
                    expected_size=found.size,
                    displayed_filename=name,
                    tqdm_class=_bar(stop),
                )
            if before and len(found.etag) == 64 and sha256_file(partial) != found.etag:
                partial.unlink()
                raise SourceError(
                    f"{self.what}: {name} of {self.name} was damaged by an interrupted download; "
                    "run the same command again to download it from the start"
                )
            os.replace(partial, blob)


def check_access(name: str, what: str) -> None:
    """Ask the hub whether this login may download from a repository, without downloading anything.

    Raises:
        SourceError: the repository does not exist, access is refused, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, is_offline_mode

    with _explained(what, name, None, "unset HF_HUB_OFFLINE" if is_offline_mode() else None):
        HfApi().model_info(name, timeout=_ANSWER_S)  # the next request has no timeout
        HfApi().auth_check(name)


def open_repository(name: str, revision: str | None, offline: bool, what: str) -> Repository:
    """Find the commit of a revision and list its files, from the hub or from the cache.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for the default branch.
        offline: use the cache only, as HF_HUB_OFFLINE=1 does.
        what: the kind of checkpoint, or "bundle", for messages.

    Raises:
        SourceError: the repository or revision does not exist, access is refused, or the hub cannot be reached and the
            cache does not have it.
    """
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.file_download import repo_folder_name

    remedy = "leave out --offline" if offline else "unset HF_HUB_OFFLINE" if is_offline_mode() else None
    storage = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type="model")
    with _explained(what, name, revision, remedy):
        found = HfApi().resolve_revision(name, revision=revision, local_files_only=remedy is not None)
        sizes = _sizes(name, found, storage / "snapshots" / found.resolved, remedy is not None)
    return Repository(name, what, revision, found.resolved, remedy, storage, sizes)


def _sizes(name: str, revision: Any, root: Path, offline: bool) -> dict[str, int]:
    """The size of every file of a commit. A commit never changes, so a listing in the cache is used first."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError, LocalEntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        return {f.path: f.size for f in get_cached_repo_tree(name, revision=revision)}
    except CachedRepoTreeNotFoundError:
        pass
    if not offline:
        try:
            tree = HfApi().list_repo_tree(name, recursive=True, revision=revision.resolved)
            return {f.path: f.size for f in tree if isinstance(f, RepoFile)}
        except (OSError, HTTPError):
            if not root.is_dir():
                raise
    # An older client kept no listing, so use the files that are there. A link to a missing file belongs to the commit.
    paths = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_symlink() or p.is_file()}
    if not paths:
        raise LocalEntryNotFoundError(f"{root} is empty")
    return {path: p.stat().st_size if p.exists() else 0 for path, p in paths.items()}


def _bar(stop: threading.Event | None = None) -> Any:
    """huggingface_hub's progress bar, shown on a terminal only.

    It also ends the download when `stop` is set; the client has no other way to do that.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"disable": None} | kwargs)

        def update(self, n: float | None = 1) -> Any:
            if stop is not None and stop.is_set():
                raise InterruptedError("another download failed")
            return super().update(n)

    return Bar


@contextmanager
def _explained(
    what: str, name: str, revision: str | None, offline: str | None, transfer: bool = False
) -> Iterator[None]:
    """Turn the exceptions of the hub's client into a `SourceError` that says what to do."""
    from huggingface_hub.errors import HTTPError, RevisionResolutionError

    try:
        yield
    # The client passes on its HTTP library's errors. Xet raises RuntimeError; a page that is not the hub's JSON raises
    # ValueError.
    except (OSError, HTTPError, RevisionResolutionError, RuntimeError, ValueError) as e:
        raise SourceError(f"{what}: {_sentence(e, name, revision, offline, transfer)}") from None


def _sentence(e: Exception, name: str, revision: str | None, offline: str | None, transfer: bool) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(e, GatedRepoError):
        return f"{name} is gated; accept its licence on the hub and log in with `hf auth login`"
    if isinstance(e, RevisionNotFoundError):
        return f"{name} has no revision {revision!r}"
    if isinstance(e, RepositoryNotFoundError):
        return (
            f"{name!r} is neither a directory here nor a repository on the hub; "
            "check the spelling, or log in with `hf auth login` if it is private"
        )
    if offline is not None:
        at = f" at revision {revision!r}" if revision else ""
        return (
            f"{name!r} is not a directory here and not in the hub's cache{at}; "
            f"check the spelling, or {offline} to download it"
        )
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full; free some space and run the same command again, "
            "or set HF_HOME to a folder on a larger disk"
        )
    if isinstance(e, PermissionError) or (isinstance(e, OSError) and e.errno == errno.EROFS):
        return f"the hub's cache cannot be written ({e}); set HF_HOME to a folder of your own"
    if isinstance(e, HfHubHTTPError) and e.response.status_code == 401:
        return f"the hub does not accept the login for {name}; log in again with `hf auth login`"
    text = str(e.__cause__ or e).strip()
    reason = text.splitlines()[0] if text else type(e).__name__
    if transfer:
        return f"the download of {name} was interrupted ({reason}); run the same command again to continue it"
    return f"{name!r} is not a directory here and the hub cannot be reached ({reason}); check the path or the network"
