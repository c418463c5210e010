"""The interface of a number format: what a linear's weight becomes, and the nodes around its product.

Each format is one module with these functions; `formats.py` is the table of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
import torch

from arcflow_export.graph.linears import LinearNode

#: Blocks [rows, out] of a weight [in, out], in order -> blocks of the tensor that is stored.
Encode = Callable[[Iterator[torch.Tensor]], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a quantised linear in the weights file: either a small `value`, or `encode` of the weight.

    `of_input` is True for a scale of the linear's input, which linears that read the same tensor have in common.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: torch.Tensor | None = None
    encode: Encode | None = None
    of_input: bool = False


class WeightFormat(Protocol):
    """A module such as `fp8.py`."""

    def refuse(self, linear: LinearNode) -> str | None:
        """Why the format cannot hold this linear, as the end of a sentence that begins with its name; else None."""

    def tensors(self, linear: LinearNode, amax: torch.Tensor, input_amax: float | None) -> tuple[StoredTensor, ...]:
        """The tensors that replace `<name>.weight`; the first of them has that name.

        Args:
            linear: the linear, in the graph before quantisation.
            amax: largest absolute weight of each output channel, [out] float32.
            input_amax: range of the linear's input over all steps, the largest of the linears that share it; None
                for a format without calibration.
        """

    def insert(self, graph: ir.Graph, linears: Sequence[LinearNode]) -> None:
        """Put the format's nodes around linears, which share those of a common input.

        Stored tensors become initializers without values; `write.attach` points them into the weights file.

        Args:
            graph: the graph.
            linears: the linears in the graph's order.
        """

    def inserted(self, model: ir.Model) -> set[str]:
        """Names of the linears that have the format's nodes."""
