"""Make axes of a graph's inputs static: ONNX graph and profiles -> the graph with the sizes that never change.

The sizes must be in the graph when a library parses it: TensorRT-RTX 1.7.1 refuses a network with FP4 whose inputs are
changed afterwards ("ScaleMode is illegal").
"""

from __future__ import annotations

import functools
from typing import Any

from arcflow_runtime.disk.engine_record import Profile
from arcflow_runtime.disk.protobuf import BYTES, SIZE, message_class

#: The subset of onnx.proto that leads to the shapes of inputs; protobuf keeps all other fields as they are.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph")},
    "Graph": {"input": (11, "Value")},
    "Value": {"name": (1, BYTES), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "Tensor")},
    "Tensor": {"shape": (2, "Shape")},
    "Shape": {"dim": (1, "Dimension")},
    "Dimension": {"dim_value": (1, SIZE), "dim_param": (2, BYTES)},
}


def fix_static_axes(graph: bytes, profiles: tuple[Profile, ...]) -> bytes:
    """Make an input's axis static if all profiles allow the same single value for it.

    Args:
        graph: an ONNX graph that `checked_graph` accepts.
        profiles: from `make_profiles`.
    """
    model = _model_class().FromString(graph)
    for value in (value for g in model.graph for value in g.input):
        dims = [dim for t in value.type for tensor in t.tensor_type for shape in tensor.shape for dim in shape.dim]
        for axis, dim in enumerate(dims):
            ranges = [profile[value.name.decode()] for profile in profiles]
            sizes = {r.min[axis] for r in ranges} | {r.max[axis] for r in ranges}
            if len(sizes) == 1:
                dim.ClearField("dim_param")
                dim.dim_value[:] = sizes
    data: bytes = model.SerializeToString()
    return data


@functools.cache
def _model_class() -> Any:
    return message_class("arcflow.static_axes", _MESSAGES, "Model")
