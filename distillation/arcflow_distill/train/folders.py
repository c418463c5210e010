"""The directory of an adapter, and the folder of a running training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcflow_distill.errors import DistillError
from arcflow_runtime.disk.files import locked

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
def training_folder(folder: Path, resume: bool, overwrite: bool, keep: bool) -> Iterator[None]:
    """Hold the folder of a running training; it is removed if it has no checkpoint at the end, or unless `keep` when
    the block ends without an error.

    Raises:
        DistillError: another run has the folder, its file system has no locks, or a stopped run's checkpoint is there
            and neither `resume` nor `overwrite` says what to do with it.
    """
    busy = f"another run is using {folder}; wait for it or give another name"
    # The lock goes with its folder.
    with locked(folder / "lock", lambda text: DistillError(f"--out: {text}"), busy, remove=False):
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
