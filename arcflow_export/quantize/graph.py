"""Insert the nodes of number formats around named linears of an ONNX graph; each format has its own, see its module."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from arcflow_export.formats.policy import Storage
from arcflow_export.graph.linears import find_linears
from arcflow_export.quantize.formats import WEIGHT_FORMATS
from arcflow_export.quantize.stored import find_weights
from arcflow_export.quantize.stored import insert as insert_stored
from arcflow_runtime.disk.manifest import QuantFormat

_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger")


class QuantizeLinears(ir.passes.InPlacePass):
    """Put the nodes of their formats around the named linears; weights become initializers without values.

    Weights of `stored` are widened by `stored.py`'s nodes.

    1. Requires: every name is a linear of the graph, and the graph is not quantised yet.
    2. Linears of one format that read the same tensor share the nodes that quantise it.
    3. `write.attach` gives the initializers their values.
    4. Ensures: the named linears and no others have the nodes of their formats.
    """

    def __init__(self, layers: Mapping[str, QuantFormat], stored: Mapping[str, Storage] | None = None) -> None:
        super().__init__()
        self._layers, self._stored = dict(layers), dict(stored or {})

    def requires(self, model: ir.Model) -> None:
        """Rule 1; raises `ir.passes.PreconditionError`."""
        if missing := sorted(self._layers.keys() - find_linears(model).keys()):
            raise ir.passes.PreconditionError(f"not linears of the graph: {missing}")
        if is_quantized(model):
            raise ir.passes.PreconditionError("the graph must be unquantised, got one that is quantised already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rules 2 and 3."""
        found, weights = find_linears(model), find_weights(model)
        insert_stored(model.graph, self._stored, weights)
        for name, implementation in WEIGHT_FORMATS.items():
            chosen = [linear for layer, linear in found.items() if self._layers.get(layer) == name]
            implementation.insert(model.graph, chosen)
        return ir.passes.PassResult(model, modified=bool(self._layers or self._stored))

    def ensures(self, model: ir.Model) -> None:
        """Rule 4; raises `ir.passes.PostconditionError`."""
        for name, implementation in WEIGHT_FORMATS.items():
            wanted = {layer for layer, chosen in self._layers.items() if chosen == name}
            if (found := implementation.inserted(model)) != wanted:
                raise ir.passes.PostconditionError(
                    f"{name}: exactly the chosen linears must have its nodes; differing: {sorted(found ^ wanted)}"
                )


def is_quantized(model: ir.Model) -> bool:
    """True if the graph has any node that quantises, dequantises or multiplies integers."""
    return any(node.op_type in _QUANTIZED for node in model.graph)
