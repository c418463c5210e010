"""Files and directories that appear whole or not at all: written under a hidden name, renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcflow_runtime.outputs import check_writable

from .errors import ExportError


@contextmanager
def staged(out: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Yield a directory to write into; it becomes `out` if the block ends without an error.

    What an earlier run left behind after being killed is removed. Two runs with the same `out` exclude each other.

    Args:
        out: the final directory.
        overwrite: replace `out` if it exists; it stays as it was until the new one is complete.
        needed_bytes: about how much will be written, checked against the free space first.

    Raises:
        ExportError: `out` exists, its parent does not, another run holds it, or the disk is (or becomes) full.
    """
    check_out(out, overwrite)
    out = out.absolute()
    lock, partial, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("lock", "partial", "old"))
    with lock.open("w") as handle:
        if not _locked(handle.fileno(), lock):
            raise ExportError(f"--out: another export is writing {out}; wait for it or give another name")
        try:
            _recover(out, partial, old)
            check_out(out, overwrite)
            free = shutil.disk_usage(out.parent).free
            if free < needed_bytes:
                raise ExportError(
                    f"--out: {out.parent} has {free / 1e9:.1f} GB free, the bundle needs {needed_bytes / 1e9:.1f} GB"
                )
            partial.mkdir()
            try:
                yield partial
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise ExportError(f"the disk of {out.parent} is full; nothing was left behind") from e
                raise
            _replace(partial, out, old)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to write into; it takes the place of `out` if the block ends without an error."""
    out = out.absolute()
    partial, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; the file takes the place of `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_out(out: Path, overwrite: bool) -> None:
    """Check that `out` can be written, before any work is done for it.

    Raises:
        ExportError: `out` exists and may not be replaced, or its parent does not exist or cannot be written to.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise ExportError(f"--out: {out.parent} is not a directory; create it first")
    if not out.exists() and not out.is_symlink():
        check_writable(out, "--out", ExportError)
        return
    if out.is_symlink() or not (out / "manifest.json").is_file():
        raise ExportError(f"--out: {out} exists and is no bundle; it will not be overwritten")
    if not overwrite:
        raise ExportError(f"--out: {out} exists; give another name, or --overwrite to replace it when done")
    check_writable(out, "--out", ExportError)


def _locked(handle: int, lock: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who held it may have removed it since it was opened here; a lock on a removed file excludes nobody.
        return os.fstat(handle).st_ino == lock.stat().st_ino
    except OSError:
        return False


def _recover(out: Path, partial: Path, old: Path) -> None:
    """Clear away what a killed run left; the replaced bundle comes back if the new one had not taken its place."""
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not out.exists():
        os.rename(old, out)
    shutil.rmtree(old, ignore_errors=True)


def _replace(partial: Path, out: Path, old: Path) -> None:
    if out.exists():
        os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old)
    else:
        os.rename(partial, out)
