"""Check the output directory of a distillation, and lock the folder of a running one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcflow_distill.errors import DistillError
from arcflow_runtime.disk.files import locked

#: The files that an adapter's directory must have.
ADAPTER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def check_out(out: Path, overwrite: bool) -> None:
    """Check that an adapter can be written to `out`; called before any long work.

    Raises:
        DistillError: `out` exists and may not be replaced, or its parent does not exist.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise DistillError(f"--out: {out.parent} is not a directory; create it first")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not all((out / name).is_file() for name in ADAPTER_FILES):
        raise DistillError(f"--out: {out} exists and is not an adapter; it will not be overwritten, give another name")
    if not overwrite:
        raise DistillError(f"--out: {out} exists; give another name, or --overwrite to replace it when done")


@contextmanager
def training_folder(folder: Path, resume: bool, overwrite: bool, keep: bool) -> Iterator[None]:
    """Create and lock the folder of a running training.

    At the end the folder is removed if it has no checkpoint, or if the block ended without an error and `keep` is
    False.

    Raises:
        DistillError: another run holds the folder, its file system does not support locks, or it has the checkpoint of
            a stopped run and neither `resume` nor `overwrite` is set.
    """
    busy = f"another run is using {folder}; wait for it or give another name"
    # The lock file is removed together with its folder.
    with locked(folder / "lock", lambda text: DistillError(f"--out: {text}"), busy, remove=False):
        state = folder / "state.safetensors"
        if state.exists() and not resume and not overwrite:
            raise DistillError(f"{folder} holds a stopped run; --resume continues it, --overwrite starts again")
        if not resume:
            state.unlink(missing_ok=True)
        done = False
        try:
            yield
            done = True
        finally:
            if (done and not keep) or not state.exists():
                shutil.rmtree(folder)
