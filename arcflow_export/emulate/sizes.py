"""Sizes of a graph's values: bind its symbolic dimensions to numbers, and count elements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod

import numpy as np
import onnx_ir as ir

Sizes = Mapping[str, int]


def bind(inputs: Iterable[ir.Value], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The size of every symbolic dimension of the graph's inputs, taken from the input arrays."""
    sizes: dict[str, int] = {}
    for value in inputs:
        array = arrays.get(str(value.name))
        if array is not None and value.shape is not None:
            sizes |= {str(d): n for d, n in zip(value.shape, array.shape, strict=True) if _named(d)}
    return sizes


def nominal(inputs: Iterable[ir.Value], size: int = 1024) -> dict[str, int]:
    """Give every symbolic dimension of the graph's inputs the same size, where only proportions matter."""
    return {str(d): size for value in inputs for d in value.shape or () if _named(d)}


def dimensions(value: ir.Value, sizes: Sizes) -> list[int | None]:
    """The value's dimensions: None for one that `sizes` does not determine; an empty list if the rank is unknown."""
    return [d if isinstance(d, int) else _evaluate(str(d), tuple(sorted(sizes.items()))) for d in value.shape or ()]


def elements(value: ir.Value, sizes: Sizes) -> int | None:
    """Number of elements of the value, or None if it is unknown."""
    if value.shape is None:
        return None
    found = dimensions(value, sizes)
    return None if None in found else prod(d for d in found if d is not None)


def _named(dim: object) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is not None


@lru_cache(maxsize=4096)
def _evaluate(dim: str, sizes: tuple[tuple[str, int], ...]) -> int | None:
    found = ir.SymbolicDim(None if dim == "None" else dim).evaluate(dict(sizes))
    return found if isinstance(found, int) else None
