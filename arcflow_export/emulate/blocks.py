"""Run a graph on a CPU piece by piece with bounded memory; the drift gate and `arcflow verify` run bundles this way.

A graph whose weights fit in one piece becomes one ONNX Runtime session, which stays open. A larger graph is cut between
nodes. Its pieces run one after the other over all inputs. A piece's weights are read from the bundle's files and are in
memory only while it runs. Values that later pieces need are kept as arrays.

Attention over many tokens is computed for some rows at a time; see `attention.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as convenience
import onnx_ir.passes.common as common
import onnxruntime as ort
from tqdm import tqdm

from arcflow_export.emulate.attention import Rows, plan_rows, split_rows
from arcflow_export.emulate.emulate import MOVES, emulate, load_graph, release
from arcflow_export.emulate.nvfp4 import lower_nvfp4
from arcflow_export.emulate.sizes import Sizes, bind, elements, nominal
from arcflow_export.graph.nvfp4 import DYNAMIC_QUANTIZE
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.base import Engine
from arcflow_runtime.engines.cpu import check_names, first_line
from arcflow_runtime.engines.onnxruntime import session_options
from arcflow_runtime.errors import EngineError

#: Largest weights of one piece, counted in float32. One piece is in memory at a time; twice while it is opened.
PIECE_BYTES = 1 << 30
#: Smaller constants stay in the graph, where the optimiser sees them; larger ones are passed when the session runs.
_INLINE_BYTES = 64 << 10
#: Nodes between a quantised linear and its weight or activation. No piece ends there, because the output of a
#: DequantizeLinear is not rounded (see `emulate.py`). An NVFP4 linear has a Cast after it.
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", DYNAMIC_QUANTIZE)
_UNROUNDED = MOVES | {"Cast"}
_FLOAT32_BYTES = 4
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """Consecutive nodes of a graph: the values that they read from earlier nodes, and those that are needed later."""

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


class BlockEngine:
    """An engine that runs a graph in pieces; bfloat16 and float16 are emulated. One thread at a time may run it."""

    def __init__(self, part: str, model: ir.Model, rounded: bool = True, piece_bytes: int = PIECE_BYTES) -> None:
        """Cut the graph into pieces; reads no weights yet.

        Args:
            part: name of the part, for errors.
            model: the graph, with its weights in files.
            rounded: see `emulate`.
            piece_bytes: largest size of a piece's weights in float32; a single node may exceed it.
        """
        self._part, self._model, self._rounded = part, model, rounded
        common.RemoveUnusedNodesPass()(model)
        self._outputs = {str(v.name) for v in model.graph.outputs}
        self.pieces = cut(model.graph, piece_bytes)
        self._open: tuple[Rows, _Session] | None = None
        self._closed = False

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run the graph; see `Engine.run`."""
        (outputs,) = self.run_all([inputs])
        return outputs

    def run_all(self, batches: Sequence[Arrays]) -> Iterator[dict[str, np.ndarray]]:
        """Run the graph on several sets of inputs, opening every piece once. See `StreamedEngine.run_all`."""
        if self._closed:
            raise EngineError(f"{self._part}: the engine is closed; load the pipeline again")
        if len(self.pieces) == 1:
            for batch in batches:
                yield self._whole(batch).run(batch)
            return
        states = [dict(batch) for batch in batches]
        sizes = _largest([bind(self._model.graph.inputs, batch) for batch in batches])
        for i, piece in enumerate(tqdm(self.pieces, desc=self._part, unit="piece", leave=False, disable=None)):
            last = i == len(self.pieces) - 1
            needed = {str(v.name) for later in self.pieces[i + 1 :] for v in later.inputs} | self._outputs
            session = self._session(piece, sizes, resident=False)
            for state in states:
                state |= session.run(state)
                if last:
                    yield {name: state[name] for name in self._outputs}
                for name in state.keys() - needed:
                    del state[name]
                if last:
                    state.clear()
            session.close()

    def close(self) -> None:
        """Free the session; see `Engine.close`."""
        self._open, self._closed = None, True

    def kept_bytes(self, sizes: Sizes) -> int:
        """The largest number of bytes kept between two pieces for one set of inputs, without the inputs themselves."""
        given = set(self._model.graph.inputs)
        kept = ([v for v in p.inputs if v not in given] for p in self.pieces)
        return max(sum(_FLOAT32_BYTES * (elements(v, sizes) or 0) for v in values) for values in kept)

    def _whole(self, batch: Arrays) -> _Session:
        """The only session. It is opened again if these inputs need their attention split differently."""
        sizes = bind(self._model.graph.inputs, batch)
        rows = plan_rows(self._model.graph, sizes)
        if self._open is None or self._open[0] != rows:
            self._open = None
            self._open = rows, self._session(self.pieces[0], sizes, resident=True)
        return self._open[1]

    def _session(self, piece: Piece, sizes: Sizes, resident: bool) -> _Session:
        graph = convenience.extract(self._model.graph, piece.inputs, piece.outputs)
        split_rows(graph, plan_rows(graph, sizes))
        model = ir.Model(graph, ir_version=self._model.ir_version)
        return _Session(self._part, emulate(lower_nvfp4(model), self._rounded), resident)


class EmulatedBackend:
    """Runs bundles of any precision and size on a CPU; bfloat16 and float16 are emulated."""

    def check(self, bundle: Bundle) -> None:
        """Accept every bundle: the emulation runs any precision."""

    def open(self, bundle: Bundle, part: str) -> Engine:
        """Load part `part` of a `widened` bundle; raises `EngineError` as ONNX Runtime's backend does."""
        model = load_graph(bundle, part)
        check_names(bundle, part, _names(model.graph.inputs), _names(model.graph.outputs))
        return BlockEngine(part, model)


def cut(graph: ir.Graph, piece_bytes: int) -> tuple[Piece, ...]:
    """Cut a graph into pieces whose weights take at most `piece_bytes` in float32, at places where few values cross.

    A single node may have more weights than that. No cut lies between a quantised linear and its Q or DQ.
    """
    nodes = list(graph)
    crossing = _crossing_elements(graph, nodes)
    ends = [0]
    while ends[-1] < len(nodes):
        ends.append(_end(nodes, crossing, ends[-1], piece_bytes))
    return tuple(_piece(graph, nodes[a:b]) for a, b in pairwise(ends))


def _end(nodes: Sequence[ir.Node], crossing: Sequence[float], start: int, piece_bytes: int) -> int:
    """The end of the piece that begins at `start`: the place that the fewest elements cross, among those where the
    piece is at least half full.
    """
    open_places: list[int] = []
    late: list[int] = []
    seen: set[ir.Value] = set()
    held = 0
    for i in range(start, len(nodes)):
        new = {v for v in nodes[i].inputs if v is not None and v.is_initializer()} - seen
        seen |= new
        held += _weight_bytes(new)
        if held > piece_bytes and open_places:
            return min(late or open_places[-1:], key=lambda place: (crossing[place], -place))
        if crossing[i + 1] < inf:
            open_places.append(i + 1)
            if 2 * held > piece_bytes:
                late.append(i + 1)
            if held > piece_bytes:
                return i + 1
    return len(nodes)


def _crossing_elements(graph: ir.Graph, nodes: Sequence[ir.Node]) -> list[float]:
    """For each place i, the number of elements that cross it from nodes before i to nodes from i on; Inf where no cut
    is allowed.
    """
    sizes = nominal(graph.inputs)
    place = {node: i for i, node in enumerate(nodes)}
    change = [0.0] * (len(nodes) + 1)
    closed = [False] * (len(nodes) + 1)
    unrounded: set[ir.Value] = set()
    for i, node in enumerate(nodes):
        quantizer = node.op_type in _QUANTIZERS or (node.op_type in _UNROUNDED and not unrounded.isdisjoint(node.inputs))
        for value in node.outputs:
            users = [place[user] for user, _ in value.uses()]
            if not users:
                continue
            change[i + 1] += elements(value, sizes) or 0
            change[max(users) + 1] -= elements(value, sizes) or 0
            if quantizer:
                unrounded.add(value)
                closed[i + 1 : max(users) + 1] = [True] * (max(users) - i)
    return [inf if shut else size for size, shut in zip(accumulate(change), closed, strict=True)]


def _piece(graph: ir.Graph, nodes: Sequence[ir.Node]) -> Piece:
    inside = set(nodes)
    taken = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and not v.is_initializer())
    given = dict.fromkeys(
        v
        for node in nodes
        for v in node.outputs
        if v.is_graph_output() or any(user not in inside for user, _ in v.uses())
    )
    return Piece(tuple(v for v in taken if v.producer() not in inside), tuple(given))


def _weight_bytes(weights: Iterable[ir.Value]) -> int:
    return sum(_FLOAT32_BYTES * v.const_value.size for v in weights if v.const_value is not None)


def _largest(found: Sequence[Sizes]) -> dict[str, int]:
    return {name: max(sizes[name] for sizes in found) for name in found[0]} if found else {}


class _Session:
    """One piece in ONNX Runtime. With `resident`, the session owns its weights and prepares them once for many runs."""

    def __init__(self, part: str, model: ir.Model, resident: bool) -> None:
        self._part = part
        options = session_options(None)
        # In the graph's order, values are used soon after they are computed. A memory arena would never shrink again.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
        graph = model.graph
        self._inputs = [str(v.name) for v in graph.inputs]
        self._outputs = [str(v.name) for v in graph.outputs]
        weights: dict[str, ort.OrtValue] = {}
        self._mapped: list[ir.TensorProtocol] = []
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= _INLINE_BYTES:
                value.const_value = ir.tensor(tensor.numpy(), name=name)
                continue
            weights[name], shape = _ort_value(tensor), ir.Shape(tensor.shape.numpy())
            self._mapped.append(tensor)
            if resident:  # the graph refers to an external file of this name; the values are passed in `options`
                value.const_value = ir.ExternalTensor(name, 0, None, tensor.dtype, shape=shape, name=name)
            else:
                del graph.initializers[name]
                value.const_value, value.shape, value.type = None, shape, ir.TensorType(tensor.dtype)
                graph.inputs.append(value)
        if resident and weights:
            options.add_external_initializers(list(weights), list(weights.values()))
        self._weights, self._resident = weights, resident
        try:
            self._session = ort.InferenceSession(
                ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as e:  # ONNX Runtime's exceptions share no base but Exception
            raise EngineError(f"{part}: ONNX Runtime cannot load the graph: {first_line(e)}") from e

    def run(self, state: Arrays) -> dict[str, np.ndarray]:
        """The piece's outputs by name."""
        given = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(state[name])) for name in self._inputs}
        try:
            found = self._session.run_with_ort_values(self._outputs, given if self._resident else given | self._weights)
        except Exception as e:  # ONNX Runtime's exceptions share no base but Exception
            shapes = {name: f"{state[name].dtype}{list(state[name].shape)}" for name in self._inputs}
            raise EngineError(f"{self._part}: ONNX Runtime failed on inputs {shapes}: {first_line(e)}") from e
        return {name: value.numpy() for name, value in zip(self._outputs, found, strict=True)}

    def close(self) -> None:
        """Free the session and its weights."""
        del self._session, self._weights
        for tensor in self._mapped:
            release(tensor)


def _ort_value(tensor: ir.TensorProtocol) -> ort.OrtValue:
    """The tensor as an OrtValue, without a copy."""
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.FLOAT8E4M3FN:  # numpy has no such dtype
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), int(tensor.dtype))
    return ort.OrtValue.ortvalue_from_numpy(array)


def _names(values: Sequence[ir.Value]) -> list[str]:
    return [value.name or "" for value in values]
