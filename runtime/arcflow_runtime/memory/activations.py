"""A bound on the memory of a part's activations: its ONNX graph and the shapes of its inputs -> bytes.

The nodes run in the graph's order, each result is kept until its last use, and the bound is the most bytes of results
that exist at one time. Results that only give another shape to a value share its memory. The part's own inputs and
outputs do not count, because the caller has them.

A library that fuses nodes needs less, apart from three things, which are added. It joins products of one value, such as
queries, keys and values, so that their results exist together. It may copy a product's result into another layout, so
the largest counts twice. And its kernels have scratch memory.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.protobuf import BYTES, NUMBER, SIZE, TEXTS, message_class
from arcflow_runtime.engines.modes import MemoryRules
from arcflow_runtime.errors import BundleError

if TYPE_CHECKING:
    from arcflow_runtime.gpu.engine import Shapes

#: The subset of onnx.proto that has names and types of values.
_MESSAGES = {
    "Model": {"graph": (7, "Graph"), "functions": (25, "Function")},
    "Function": {"name": (1, BYTES)},
    "Graph": {
        "node": (1, "Node"),
        "initializer": (5, "Tensor"),
        "input": (11, "Value"),
        "output": (12, "Value"),
        "value_info": (13, "Value"),
    },
    "Node": {"input": (1, TEXTS), "output": (2, TEXTS), "op_type": (4, BYTES), "attribute": (5, "Attribute")},
    "Attribute": {"g": (6, "Graph"), "graphs": (11, "Graph")},
    "Tensor": {"name": (8, BYTES)},
    "Value": {"name": (1, BYTES), "type": (2, "Type")},
    "Type": {"tensor_type": (1, "TensorType")},
    "TensorType": {"elem_type": (1, NUMBER), "shape": (2, "Shape")},
    "Shape": {"dim": (1, "Dimension")},
    "Dimension": {"dim_value": (1, SIZE), "dim_param": (2, BYTES)},
}
#: TensorProto.DataType -> bytes per element: float32, uint8, int8, int32, int64, bool, float16, float64, uint32,
#: uint64, bfloat16, E4M3, and E2M1, which takes half a byte.
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2, 17: 1, 23: 1}
_FLOATS = {1, 10, 11, 16}
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
#: A larger result is an error in the graph.
_MOST_BYTES = 1 << 50
#: Longest expression of a dimension that is evaluated.
_MAX_EXPRESSION = 200


@dataclass(frozen=True)
class _Value:
    dtype: int
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def source(self) -> str:
        """The first input; "" if there is none."""
        return self.inputs[0] if self.inputs else ""


@dataclass(frozen=True)
class PartGraph:
    """The nodes of a part's graph and the types of their results."""

    nodes: tuple[_Node, ...]
    values: Mapping[str, _Value]
    inputs: tuple[str, ...]
    outputs: frozenset[str]
    #: Initializers, and what is computed from them alone; an engine has these as weights.
    constants: frozenset[str]
    #: `constants`, and the results of DequantizeLinear on them, also cast.
    weights: frozenset[str]

    @staticmethod
    def read(bundle: Bundle, part: str) -> PartGraph | None:
        """Read a part's graph; None if it has functions or subgraphs, whose memory is not counted.

        Raises:
            BundleError: the file is not an ONNX graph, or breaks rule B8.
        """
        path = checked_graph(bundle, part)
        try:
            return PartGraph.parse(path.read_bytes())
        except DecodeError:
            raise BundleError(f"{path} is not an ONNX graph; export the bundle again") from None

    @staticmethod
    def parse(data: bytes) -> PartGraph | None:
        """As `read`, from the bytes of an ONNX file.

        Raises:
            DecodeError: the bytes are not such a file.
        """
        model = message_class("arcflow.activations", _MESSAGES, "Model")()
        model.ParseFromString(data)
        if len(model.graph) != 1 or model.functions:
            return None
        graph = model.graph[0]
        if any(a.g or a.graphs for node in graph.node for a in node.attribute):
            return None
        nodes = tuple(_Node(_text(n.op_type), _texts(n.input), _texts(n.output)) for n in graph.node)
        constants = {_text(t.name) for t in graph.initializer}
        inputs = tuple(_text(v.name) for v in graph.input if _text(v.name) not in constants)
        for node in nodes:
            if node.op != "DequantizeLinear" and all(name in constants for name in node.inputs):
                constants.update(node.outputs)
        dequantized: set[str] = set()
        for node in nodes:
            # An NVFP4 weight is cast after its DequantizeLinear (B15).
            if (node.op == "DequantizeLinear" and node.source in constants) or (
                node.op == "Cast" and node.source in dequantized
            ):
                dequantized.update(node.outputs)
        weights = frozenset(constants | dequantized)
        values = {_text(v.name): _value(v) for v in (*graph.input, *graph.value_info, *graph.output)}
        outputs = frozenset(_text(v.name) for v in graph.output)
        return PartGraph(nodes, values, inputs, outputs, frozenset(constants), weights)

    def activation_bytes(self, inputs: Shapes, rules: MemoryRules) -> int | None:
        """The bound for inputs of these shapes, or None if the graph does not give the shape of a value."""
        if (sizes := self._sizes(inputs)) is None:
            return None
        owners = self._owners(rules)
        nbytes: dict[str, int] = {}
        joined = self._joined_products(rules)
        for name, owner in owners.items():
            if name != owner and name not in joined:
                continue  # a view
            if (found := self._bytes(name, sizes, rules)) is None:
                return None
            nbytes[owner] = nbytes.get(owner, 0) + found
        last = {owners[n]: i for i, node in enumerate(self.nodes) for n in (*node.inputs, *node.outputs) if n in owners}
        ends: dict[int, list[str]] = {}
        for name, index in last.items():
            ends.setdefault(index, []).append(name)
        held, most = rules.scratch_bytes, 0
        for index, node in enumerate(self.nodes):
            held += sum(nbytes[o] for o in node.outputs if owners.get(o) == o)
            scores = self._scores(node, sizes, rules)
            if scores is None:
                return None
            most = max(most, held + scores)
            held -= sum(nbytes[name] for name in ends.get(index, ()))
        products = (self._bytes(name, sizes, rules) for name in self._products(rules))
        return most + max((n for n in products if n is not None), default=0)

    def _sizes(self, inputs: Shapes) -> tuple[tuple[str, int], ...] | None:
        """The size of every named dimension of the inputs; None if they are not those of the graph."""
        sizes: dict[str, int] = {}
        for name in self.inputs:
            dims, shape = self.values[name].dims, inputs.get(name, ())
            if len(dims) != len(shape):
                return None
            sizes |= {d: n for d, n in zip(dims, shape, strict=True) if isinstance(d, str)}
        return tuple(sorted(sizes.items()))

    def _owners(self, rules: MemoryRules) -> dict[str, str]:
        """Name of each counted result -> the result whose memory it uses; that of a view is its source."""
        owners: dict[str, str] = {}
        outside = self.outputs | self.constants | set(self.inputs)
        joined = self._joined_products(rules)
        for node in self.nodes:
            source = node.source
            if rules.fused and self.weights.issuperset(node.outputs):
                outside |= {*node.outputs}
            for name in filter(None, node.outputs):
                if node.op in _VIEWS and (source in owners or source in outside):
                    if source in owners:
                        owners[name] = owners[source]
                elif name not in outside:
                    owners[name] = joined.get(name, name)
        return owners

    def _joined_products(self, rules: MemoryRules) -> dict[str, str]:
        """Result of each product of a value with weights -> the first such result of the same value."""
        groups: dict[str, list[str]] = {}
        for name, source in self._products(rules).items():
            groups.setdefault(source, []).append(name)
        return {name: made[0] for made in groups.values() for name in made}

    def _products(self, rules: MemoryRules) -> dict[str, str]:
        """Result of each product with weights -> the value that is multiplied, where the library joins products."""
        return {
            node.outputs[0]: node.source
            for node in (self.nodes if rules.fused else ())
            if node.op == "MatMul" and self.weights.issuperset(node.inputs[1:2])
            if node.outputs and node.outputs[0] not in self.outputs | self.constants
        }

    def _bytes(self, name: str, sizes: tuple[tuple[str, int], ...], rules: MemoryRules) -> int | None:
        value = self.values.get(name)
        item = None if value is None else _item_bytes(value.dtype, rules)
        if value is None or item is None:
            return None
        shape = _shape(value.dims, sizes)
        nbytes = None if shape is None else item * math.prod(shape)
        return None if nbytes is None or nbytes > _MOST_BYTES else nbytes

    def _scores(self, node: _Node, sizes: tuple[tuple[str, int], ...], rules: MemoryRules) -> int | None:
        """Bytes of an attention's scores before and after the softmax, twice [B, heads, T, S]; 0 for other nodes."""
        if node.op != "Attention" or rules.fused:
            return 0
        query, key = (self.values.get(name) for name in (*node.inputs, "", "")[:2])
        if query is None or key is None or len(query.dims) != 4 or len(key.dims) != 4:
            return None
        asked, given = _shape(query.dims, sizes), _shape(key.dims, sizes)
        item = _item_bytes(query.dtype, rules)
        if asked is None or given is None or item is None:
            return None
        return 2 * item * math.prod(asked[:3]) * given[2]


def _texts(fields: Iterable[bytes]) -> tuple[str, ...]:
    return tuple(map(_text, fields))


def _text(field: bytes) -> str:
    return field.decode("utf-8", "backslashreplace")


def _value(info: Any) -> _Value:
    tensors = [t for kind in info.type for t in kind.tensor_type]
    if len(tensors) != 1 or len(tensors[0].elem_type) != 1 or len(tensors[0].shape) != 1:
        return _Value(0, ())
    dims = (d.dim_value[-1] if d.dim_value else _text(d.dim_param) for d in tensors[0].shape[0].dim)
    return _Value(tensors[0].elem_type[0], tuple(dims))


def _item_bytes(dtype: int, rules: MemoryRules) -> int | None:
    item = _ITEM_BYTES.get(dtype)
    return max(item, rules.least_item_bytes) if item is not None and dtype in _FLOATS else item


def _shape(dims: tuple[int | str, ...], sizes: tuple[tuple[str, int], ...]) -> tuple[int, ...] | None:
    found = [d if isinstance(d, int) else _evaluate(d, sizes) for d in dims]
    return None if any(d is None or d < 0 for d in found) else tuple(d for d in found if d is not None)


@lru_cache(maxsize=4096)
def _evaluate(dim: str, sizes: tuple[tuple[str, int], ...]) -> int | None:
    """The value of a dimension such as "4*latent_height", or None if it is not made of names and + - * // and %."""
    if len(dim) > _MAX_EXPRESSION:
        return None
    try:
        return _number(ast.parse(dim, mode="eval").body, dict(sizes))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return None


def _number(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left, sizes), _number(node.right, sizes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
        if isinstance(node.op, ast.Mod):
            return left % right
    raise ValueError("not a sum, product or quotient of sizes")
