"""Check that an output path can be written before a long job starts; called by commands for options like `--out`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from arcflow_runtime.errors import ArcFlowError, RequestError

#: Size of the trial file; a full disk may still accept an empty one.
_TRIAL_BYTES = 4096


def check_writable(out: Path, option: str, error: type[ArcFlowError] = RequestError) -> None:
    """Check that a file or folder `out` can be created, by writing a hidden file beside it and removing it.

    Results are written beside `out` and renamed, so its parent folder must be writable.

    Args:
        out: the file or folder to be written; its parent must exist.
        option: the option that named it, such as "--out", for the message.
        error: the class of the exception.

    Raises:
        ArcFlowError: of class `error`; the parent folder is not writable, or the disk is full.
    """
    folder = out.absolute().parent
    try:
        handle, trial = tempfile.mkstemp(prefix=f".{out.name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(bytes(_TRIAL_BYTES))
        finally:
            os.unlink(trial)
    except OSError as e:
        raise error(f"{option}: {out} cannot be written ({e.strerror or e}); give another place") from None


def check_file(out: Path, option: str, error: type[ArcFlowError] = RequestError) -> None:
    """Check that a file `out` can be written or replaced; see `check_writable` for the arguments.

    Raises:
        ArcFlowError: of class `error`; `out` is a directory, its parent does not exist, or it cannot be written.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise error(f"{option}: {folder} is not a directory; create it first")
    if out.is_dir():
        raise error(f"{option}: {out} is a directory; give a file's name")
    check_writable(out, option, error)
