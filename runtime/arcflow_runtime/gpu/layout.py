"""Lay out named arrays in one allocation: shapes and dtypes -> byte offsets, each a multiple of `ALIGNMENT`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from arcflow_runtime.disk.dtypes import ITEM_BYTES
from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.gpu.device import ALIGNMENT

if TYPE_CHECKING:
    import numpy as np

#: Dtype of a region: that of a part's input or output, or float64 for the sigmas.
StoredDType = DType | Literal["float64"]


@dataclass(frozen=True)
class Region:
    """An array in an allocation, `offset` bytes from its start."""

    offset: int
    shape: tuple[int, ...]
    dtype: StoredDType

    @property
    def nbytes(self) -> int:
        """Size in bytes, without padding."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def view(self, memory: np.ndarray) -> np.ndarray:
        """This region as an array; `memory` is the whole allocation in host memory, [nbytes] uint8."""
        # Here, because sums of memory need layouts but not numpy.
        from arcflow_runtime.maths.dtypes import NUMPY

        return memory[self.offset : self.offset + self.nbytes].view(NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Layout:
    """Regions by name, one after another; `nbytes` is the size of the allocation."""

    regions: Mapping[str, Region]
    nbytes: int

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]

    def __contains__(self, name: str) -> bool:
        return name in self.regions

    @staticmethod
    def of(arrays: Mapping[str, tuple[tuple[int, ...], StoredDType]]) -> Layout:
        """Place arrays of these shapes and dtypes. An empty array gets an address of its own too."""
        regions, offset = {}, 0
        for name, (shape, dtype) in arrays.items():
            regions[name] = Region(offset, tuple(shape), dtype)
            offset += -(-max(regions[name].nbytes, 1) // ALIGNMENT) * ALIGNMENT
        return Layout(regions, max(offset, ALIGNMENT))
