"""Lock files between processes, atomic writing of files and directories, and SHA-256 of files.

A file or directory is written under a hidden name and renamed when complete. Its permissions are then those that the
umask gives a new file, whatever the library that wrote it chose.
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
    """Hold an exclusive lock on a file. Other processes and threads that ask for it wait or get an error.

    Args:
        lock: the lock file. It is created, and so is its folder, whose parent must exist.
        error: makes the exception to raise from a message.
        busy: the message if another process holds the lock.
        wait: wait for the lock instead of raising.
        remove: remove the file at the end. All users of one lock must pass the same value: a lock on a removed file
            excludes nobody.

    Raises:
        error: another process holds the lock, or the file system does not support locks.
        OSError: the file cannot be created.
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
    """Lock a folder inside a bundle, such as `engines`, for writing; remove it at the end if it is empty.

    Args:
        folder: created if it is missing; must not be a symbolic link.
        busy: the error message if another process holds the lock.
        what: what the folder holds, such as "engines", for error messages.

    Raises:
        EngineError: another process holds the lock, or the folder cannot be written or locked.
    """
    lock = folder / ".lock"
    try:
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        handle = _open_locked(lock, EngineError, busy, wait=False)
    except OSError as e:
        raise EngineError(
            f"{folder} cannot be written: {e.strerror}; {what} are stored in the bundle's folder, so make it writable"
        ) from e
    try:
        yield folder
    finally:
        lock.unlink(missing_ok=True)
        with suppress(OSError):  # the folder is not empty
            folder.rmdir()
        os.close(handle)


def _open_locked(lock: Path, error: Callable[[str], Exception], busy: str, wait: bool) -> int:
    import fcntl  # imported here because Windows lacks it

    while True:
        lock.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the previous holder of the lock removed the folder
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
    """True if the error means that the disk or the user's disk quota is full."""
    return error.errno in _FULL


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file is renamed to `path` if the block ends without an error."""
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
    """Yield a temporary directory to write into; it is renamed to `out` if the block ends without an error."""
    partial, old = hidden(out, "partial"), hidden(out, "old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replace_directory(partial, out.absolute(), old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(partial: Path, out: Path, old: Path) -> None:
    """Rename the finished directory `partial` to `out`; an existing `out` is first moved to `old`, then removed."""
    _follow_umask(partial)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def hidden(out: Path, suffix: str) -> Path:
    """The absolute path `.NAME.suffix` beside `out`, on the same file system."""
    out = out.absolute()
    return out.parent / f".{out.name}.{suffix}"


def _follow_umask(folder: Path) -> None:
    probe = folder / ".mode"  # os.umask can be read only by changing it, for every thread of the process
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
