"""Write a bundle's directory atomically: under a hidden name at first, renamed when it is complete.

`arcflow export` and `arcflow quantize` use this.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcflow_export.errors import ExportError
from arcflow_runtime.disk.files import hidden, is_full, locked, replace_directory
from arcflow_runtime.disk.outputs import check_writable


@contextmanager
def staged(out: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Yield a directory to write into; it becomes `out` if the block ends without an error.

    Leftovers of an earlier run that was killed are removed. A lock keeps a second run from writing the same `out`.

    Args:
        out: the final directory.
        overwrite: replace `out` if it exists; it stays unchanged until the new one is complete.
        needed_bytes: about how many bytes will be written; compared with the free space first.

    Raises:
        ExportError: `out` exists, its parent does not, another run holds it, or the disk is (or becomes) full.
    """
    check_out(out, overwrite)
    out = out.absolute()
    lock, partial, old = (hidden(out, suffix) for suffix in ("lock", "partial", "old"))
    busy = f"another export is writing {out}; wait for it or give another name"
    with locked(lock, lambda text: ExportError(f"--out: {text}"), busy):
        _recover(out, partial, old)
        check_out(out, overwrite)
        free = shutil.disk_usage(out.parent).free
        if free < needed_bytes:
            raise ExportError(
                f"--out: {out.parent} has {free / 1e9:.1f} GB free, the bundle needs {needed_bytes / 1e9:.1f} GB; "
                "free some space, or give a folder on a larger disk"
            )
        partial.mkdir()
        try:
            yield partial
            replace_directory(partial, out, old)
        except OSError as e:
            if is_full(e):
                raise ExportError(f"the disk of {out.parent} is full; nothing was left behind") from e
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_out(out: Path, overwrite: bool) -> None:
    """Check that a bundle can be written to `out`; called before any long work.

    Raises:
        ExportError: `out` exists and may not be replaced, or its parent does not exist or is not writable.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise ExportError(f"--out: {out.parent} is not a directory; create it first")
    if not out.exists() and not out.is_symlink():
        check_writable(out, "--out", ExportError)
        return
    if out.is_symlink() or not (out / "manifest.json").is_file():
        raise ExportError(f"--out: {out} exists and is not a bundle; it will not be overwritten, give another name")
    if not overwrite:
        raise ExportError(f"--out: {out} exists; give another name, or --overwrite to replace it when done")
    check_writable(out, "--out", ExportError)


def _recover(out: Path, partial: Path, old: Path) -> None:
    """Remove what a killed run left behind. If it was killed between its two renames, put the old bundle back."""
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not out.exists():
        os.rename(old, out)
    shutil.rmtree(old, ignore_errors=True)
