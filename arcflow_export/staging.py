"""A directory that appears whole or not at all: written under a hidden name, renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    out = out.absolute()
    if not out.parent.is_dir():
        raise ExportError(f"--out: {out.parent} is not a directory; create it first")
    if out.exists() and not overwrite:
        raise ExportError(f"--out: {out} exists; give another name, or --overwrite to replace it when done")
    if out.exists() and not (out / "manifest.json").is_file():
        raise ExportError(f"--out: {out} exists and is no bundle; it will not be overwritten")
    lock = out.parent / f".{out.name}.lock"
    partial = out.parent / f".{out.name}.partial"
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ExportError(f"--out: another export is writing {out}; wait for it or give another name") from None
        try:
            shutil.rmtree(partial, ignore_errors=True)
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
            _replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _replace(partial: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
        os.rename(partial, out)
        shutil.rmtree(old)
    else:
        os.rename(partial, out)
