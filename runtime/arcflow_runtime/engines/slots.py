"""The inputs of a part's LoRA slots when a request has no LoRA, for engines that accept a rank of 0."""

from __future__ import annotations

import numpy as np

from arcflow_runtime.disk.manifest import Part
from arcflow_runtime.maths.dtypes import NUMPY


def empty_slots(part: Part) -> dict[str, np.ndarray]:
    """An array of rank 0 for every input of a part's LoRA slots; empty if it has none."""
    if part.lora is None:
        return {}
    return {name: np.zeros(shape, NUMPY[dtype]) for name, (shape, dtype) in part.lora.shapes({}).items()}
