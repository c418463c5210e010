"""Read what a plan of TensorRT-RTX computes. A plan is text in places: it lists every product with its operands."""

from __future__ import annotations

import re
from pathlib import Path

#: What the builder calls a kernel that copies an operand into a larger one.
PADDING = "MoveReplConc"


def read_plan(path: Path) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """Name of each product by a weight -> dtypes of its two operands, and the names of the fused kernels.

    Products that the builder joined have one name, with a `+` between the names of the parts.
    """
    text = path.read_bytes().decode("latin-1")
    dtypes = dict(re.findall(r'tensor=\{[^\n]*? name="([^"]*)"[^\n]*? type=(\w+) \}', text))
    products = {}
    for name, operands in re.findall(r'fully_connected=\{ name="([^"]*)" output=\{[^}]*\} input=\{([^}]*)\}', text):
        first, second = re.findall(r'"([^"]*)"', operands)[:2]
        products[name] = (dtypes[first], dtypes[second])
    return products, set(re.findall(r"__myl_[A-Za-z]+", text))
