"""Named regions of one allocation: shapes and dtypes -> offsets, each a multiple of `ALIGNMENT`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.gpu.device import ALIGNMENT
from arcflow_runtime.maths.dtypes import NUMPY, item_bytes

#: What a region holds: a dtype of parts, or the update kernel's float64.
Stored = DType | Literal["float64"]


@dataclass(frozen=True)
class Region:
    """An array at `offset` bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: Stored

    @property
    def nbytes(self) -> int:
        """Its size, without padding."""
        return math.prod(self.shape) * item_bytes(self.dtype)

    def view(self, memory: np.ndarray) -> np.ndarray:
        """The array in host memory [nbytes] uint8 that starts where the layout does."""
        return memory[self.offset : self.offset + self.nbytes].view(NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Layout:
    """Regions by name, one after another; `nbytes` in all."""

    regions: Mapping[str, Region]
    nbytes: int

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def __contains__(self, name: str) -> bool:
        return name in self.regions

    @staticmethod
    def of(arrays: Mapping[str, tuple[tuple[int, ...], Stored]]) -> Layout:
        """Place arrays of these shapes and dtypes; an empty one gets a place of its own too."""
        regions, offset = {}, 0
        for name, (shape, dtype) in arrays.items():
            regions[name] = Region(offset, tuple(shape), dtype)
            offset += -(-max(regions[name].nbytes, 1) // ALIGNMENT) * ALIGNMENT
        return Layout(regions, max(offset, ALIGNMENT))
