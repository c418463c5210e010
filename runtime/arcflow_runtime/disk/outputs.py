"""Where a result is to be written -> an error before any work is done for it, not after hours."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from arcflow_runtime.errors import ArcFlowError, RequestError

#: Written on trial: a full disk may still take an empty file.
_TRIAL_BYTES = 4096


def check_writable(out: Path, option: str, error: type[ArcFlowError] = RequestError) -> None:
    """Check that a file or folder `out` can be made, by writing a hidden file beside it and removing it.

    Results are written beside their place and renamed, so it is the folder that must allow it.

    Args:
        out: the file or folder to be written; its folder must exist.
        option: the option that named it, such as "--out", for the message.
        error: what to raise.

    Raises:
        ArcFlowError: of class `error`; its folder cannot be written to, or the disk is full.
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
    """Check that a file `out` can be written or replaced; arguments as for `check_writable`.

    Raises:
        ArcFlowError: of class `error`; it is a directory, its folder does not exist, or it cannot be written.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise error(f"{option}: {folder} is not a directory; create it first")
    if out.is_dir():
        raise error(f"{option}: {out} is a directory; give a file's name")
    check_writable(out, option, error)
