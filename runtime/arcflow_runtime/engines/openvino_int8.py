"""Give OpenVINO's model of an int8 part (B15) the form that its CPU plugin computes with 8-bit kernels.

The plugin has no kernel for MatMulInteger: it widens codes and weights to 32 bits and multiplies those. It has one for
a product with weights that are stored in int8, and quantises the inputs itself, one scale for each group of features of
a token. B15 allows that. Weights then stay in the mapped file.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

from arcflow_runtime.errors import EngineError

#: Features of a token that share a scale; the plugin's property that turns 8-bit products on. With 256, linears take a
#: tenth less time than with 128, and the error of the means is 3 % larger (docs/precisions.md).
PROPERTIES = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 256}


def multiply_stored_weights(model: ov.Model, part: str) -> None:
    """Replace every integer product, with its cast and two scales, by a product of the input and the stored weight.

    Args:
        model: from the part's graph, changed in place.
        part: name of the part, for the error.

    Raises:
        EngineError: an integer product has another form than B15's.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and node.get_output_element_type(0) == ov.Type.i32:
            weight = _source(part, node, ("Subtract", 1), ("Convert", 0), ("Constant", 0))
            scaled = _source(
                part, node, ("Subtract", 0), ("Convert", 0), ("Convert", 0), ("FakeQuantize", 0), ("Divide", 0)
            )
            last = _reader(part, _reader(part, _reader(part, node, "Convert"), "Multiply"), "Multiply")
            scales = [n for n in (last.input_value(i).get_node() for i in (0, 1)) if n.get_type_name() == "Constant"]
            if len(scales) != 1:
                raise _wrong(part, node)
            product = ops.matmul(
                scaled.input_value(0), ops.multiply(ops.convert(weight, "f32"), scales[0]), False, False
            )
            product.set_friendly_name(node.get_friendly_name())
            last.output(0).replace(product.output(0))
    model.validate_nodes_and_infer_types()


def _source(part: str, product: ov.Node, *path: tuple[str, int]) -> ov.Node:
    """Follow inputs upwards from a product; `path` has the expected type of each node and the index of the input."""
    node = product
    for kind, index in path:
        node = node.input_value(index).get_node()
        if node.get_type_name() != kind:
            raise _wrong(part, product)
    return node


def _reader(part: str, node: ov.Node, kind: str) -> ov.Node:
    """The only node that reads `node`."""
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    if len(readers) != 1 or readers[0].get_type_name() != kind:
        raise _wrong(part, node)
    return readers[0]


def _wrong(part: str, node: ov.Node) -> EngineError:
    return EngineError(f"{part}: {node.get_friendly_name()} has another form than rule B15; quantise the bundle again")
