"""What an export can be told, and its defaults; light to import, so that the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_runtime.bundle import DType

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
OPSETS = (20, 23)


@dataclass(frozen=True)
class Options:
    """What to export and how.

    `opset` 20 decomposes attention and RMS norm, 23 has both as operators. `steps` are the step counts to bake for
    Qwen-Image; the first is the bundle's default for both families. `max_px` and `max_sequence_length` are the
    largest height or width and number of text tokens that the bundle accepts.
    """

    dtype: DType = "float32"
    opset: int = 23
    steps: tuple[int, ...] = (2,)
    keep_conditioner: bool = False
    max_px: int = 2048
    max_sequence_length: int = 512
