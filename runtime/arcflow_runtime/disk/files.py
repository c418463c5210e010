"""Locks between processes, and files and directories that appear whole or not at all.

A file or directory is written under a hidden name and renamed when complete. What has been written gets the mode that
the umask gives a new file, whatever mode the library that wrote it chose.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arcflow_runtime.errors import EngineError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def locked(
    lock: Path, error: Callable[[str], Exception], busy: str = "", wait: bool = False, remove: bool = True
) -> Iterator[None]:
    """Hold a lock file; other processes, and other threads, that ask for it wait or are refused meanwhile.

    Args:
        lock: the file; it is made, and its folder too, whose parent must exist.
        error: makes the exception to raise from its text.
        busy: the text if another holds the lock.
        wait: wait for it instead.
        remove: remove the file at the end. All who use a lock must agree: who holds a file that is kept does not look
            whether it was removed.

    Raises:
        error: another holds the lock, or the file system has no locks.
        OSError: the file cannot be made.
    """
    handle = _open_locked(lock, error, busy, wait)
    try:
        yield
    finally:
        if remove:
            lock.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def locked_folder(folder: Path, busy: str, what: str) -> Iterator[Path]:
    """Hold a folder beside a bundle's files, such as `engines`; it is removed again if it stays empty.

    Args:
        folder: made if it is missing; not a link.
        busy: the text of the error if another holds it.
        what: what it is for, such as "engines".

    Raises:
        EngineError: another holds it, or it cannot be written or locked.
    """
    lock = folder / ".lock"
    try:
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        handle = _open_locked(lock, EngineError, busy, wait=False)
    except OSError as e:
        raise EngineError(f"{folder} cannot be written: {e.strerror}; {what} are kept beside their bundle") from e
    try:
        yield folder
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something
            folder.rmdir()
        os.close(handle)


def _open_locked(lock: Path, error: Callable[[str], Exception], busy: str, wait: bool) -> int:
    import fcntl  # here, since Windows has none

    while True:
        lock.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder was removed by the one that held the lock
            if lock.parent.parent.is_dir():
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The file may have been removed since it was opened; a lock on a removed file excludes nobody.
            if _same_file(handle, lock):
                return handle
        except OSError as e:
            os.close(handle)
            if e.errno == errno.EWOULDBLOCK:
                raise error(busy) from None
            lock.unlink(missing_ok=True)
            raise error(
                f"{lock.parent} cannot be locked ({e.strerror}): its file system has no locks; use a folder on another"
            ) from e
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def is_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in _FULL


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; the file takes the place of `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to write into; it takes the place of `out` if the block ends without an error."""
    partial, old = hidden(out, "partial"), hidden(out, "old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_directory(partial, out.absolute(), old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(partial: Path, out: Path, old: Path) -> None:
    """Put the finished directory `partial` in the place of `out`, which is `old` until the new one is there."""
    _follow_umask(partial)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def hidden(out: Path, suffix: str) -> Path:
    """The hidden neighbour of `out` with this suffix, on the same file system; absolute."""
    out = out.absolute()
    return out.parent / f".{out.name}.{suffix}"


def _follow_umask(folder: Path) -> None:
    probe = folder / ".mode"  # reading the umask itself would change it for other threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in 4 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(4 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()
