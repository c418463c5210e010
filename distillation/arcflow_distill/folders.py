"""Files and directories that appear whole or not at all, and the folder of a running training."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DistillError

#: What makes a directory an adapter.
ADAPTER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def check_out(out: Path, overwrite: bool) -> None:
    """Check that an adapter can be written as `out`, before any work is done for it.

    Raises:
        DistillError: `out` exists and may not be replaced, or its parent does not exist.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise DistillError(f"--out: {out.parent} is not a directory; create it first")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not all((out / name).is_file() for name in ADAPTER_FILES):
        raise DistillError(f"--out: {out} exists and is no adapter; it will not be overwritten")
    if not overwrite:
        raise DistillError(f"--out: {out} exists; give another name, or --overwrite to replace it when done")


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


@contextmanager
def training_folder(folder: Path, resume: bool, overwrite: bool, keep: bool) -> Iterator[None]:
    """Hold the folder of a running training; it is removed if it has no checkpoint at the end, or unless `keep` when
    the block ends without an error.

    Raises:
        DistillError: another run has the folder, or a stopped run's checkpoint is there and neither `resume` nor
            `overwrite` says what to do with it.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DistillError(f"--out: another run is using {folder}; wait for it or give another name") from None
        state = folder / "state.safetensors"
        if state.exists() and not resume and not overwrite:
            raise DistillError(f"{folder} holds a stopped run; --resume continues it, --overwrite begins anew")
        if not resume:
            state.unlink(missing_ok=True)
        done = False
        try:
            yield
            done = True
        finally:
            if (done and not keep) or not state.exists():
                shutil.rmtree(folder)
