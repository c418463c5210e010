"""Check that an ONNX graph reads weights from its own part's file only: bundle and part -> path of the checked graph.

Every engine and builder calls this before it opens a graph. A graph names the files of its external data, and a library
opens whatever file is named; ONNX Runtime even accepts a memory address there. `_MESSAGES` is the subset of onnx.proto
that leads to tensors. protobuf itself parses it, so this check sees exactly what a library sees. Field numbers in
onnx.proto never change.
"""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.protobuf import BYTES, NUMBER, message_class
from arcflow_runtime.errors import BundleError

#: Weights are stored outside the graph, so a graph takes only kilobytes per layer.
MAX_GRAPH_BYTES = 256 << 20

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph"), "training_info": (20, "Training"), "functions": (25, "Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"node": (7, "Node"), "attribute_proto": (11, "Attribute")},
    "Graph": {"node": (1, "Node"), "initializer": (5, "Tensor"), "sparse_initializer": (15, "SparseTensor")},
    "Node": {"attribute": (5, "Attribute")},
    "Attribute": {
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "tensors": (10, "Tensor"),
        "graphs": (11, "Graph"),
        "sparse_tensor": (22, "SparseTensor"),
        "sparse_tensors": (23, "SparseTensor"),
    },
    "SparseTensor": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"name": (8, BYTES), "external_data": (13, "Entry"), "data_location": (14, NUMBER)},
    "Entry": {"key": (1, BYTES), "value": (2, BYTES)},
}
# TensorProto.DataLocation
_EXTERNAL = 1


def checked_graph(bundle: Bundle, part: str) -> Path:
    """The path of a part's graph, after checking that all its external data is in the part's own weights file (B8).

    Raises:
        BundleError: a tensor's data is elsewhere (the message names it), or the file is not an ONNX graph.
    """
    spec = bundle.manifest.parts[part]
    path, weights = bundle.path(spec.graph), bundle.path(spec.weights)
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise BundleError(f"{path} is larger than {MAX_GRAPH_BYTES} bytes; it is not a graph with its weights outside")
    model = _model_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise BundleError(f"{path} is not an ONNX graph; export the bundle again") from None
    location = posixpath.relpath(spec.weights, posixpath.dirname(spec.graph) or ".")
    for tensor in _tensors(model):
        external = len(tensor.external_data) > 0 or _EXTERNAL in tensor.data_location
        if external and (wrong := _breach(tensor, spec.weights, location, weights)):
            raise BundleError(f"{path}: {wrong}; export the bundle again")
    return path


def _breach(tensor: Any, weights: str, location: str, file: Path) -> str | None:
    """Describe what is wrong with one tensor's external data; None if nothing is."""
    name = _text(tensor.name)
    located, numbers = False, {"offset": 0, "length": 0}
    for entry in tensor.external_data:
        key, value = _text(entry.key), _text(entry.value)
        if key == "location":
            located = True
            # Compared as text, not resolved: '..' behind a symbolic link would lead elsewhere.
            if value.removeprefix("./") != location:
                return f"external data of tensor {name!r} must lie in the part's weights {weights}, got {value!r}"
        elif key in numbers:
            if not (value.isascii() and value.isdigit()):
                return f"external data of tensor {name!r}: {key} must be a number of bytes, got {value!r}"
            numbers[key] = int(value)
    if not located:
        return f"tensor {name!r} has external data without a location"
    size, (offset, length) = file.stat().st_size, numbers.values()
    if offset + length > size:
        return (
            f"external data of tensor {name!r} must lie within the {size} bytes of {weights}, "
            f"got bytes {offset} to {offset} + {length}"
        )
    return None


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message at any depth: initializers, attributes, subgraphs, functions."""
    for field, values in message.ListFields():
        if field.message_type is None:
            continue
        for value in values:
            if field.message_type.name == "Tensor":
                yield value
            else:
                yield from _tensors(value)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


@functools.cache
def _model_class() -> Any:
    # Every message field is declared repeated, even where onnx.proto allows one value: protobuf would merge a second
    # value into the first and so hide it from this check.
    return message_class("arcflow.external_data", _MESSAGES, "Model")
