"""Run a part on a device with numpy arrays: host arrays in -> host arrays out.

The GPU backends use it for text encoders, for profiling, and for a conditioner whose dtype differs from the backbone's.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.engines.base import LayerTime
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.arrays import host_arrays
from arcflow_runtime.gpu.device import PinnedMemory
from arcflow_runtime.gpu.engine import Context, DeviceEngine, Shapes, TimesLayers, UnloadsWeights
from arcflow_runtime.gpu.lane import Lane

# Shapes whose contexts and buffers are kept. Text length varies with Qwen-Image; with FLUX it is fixed.
_MAX_SHAPES = 4


class HostEngine:
    """An `Engine` on top of a `DeviceEngine`; one thread runs at a time, others wait."""

    def __init__(self, lane: Lane, manifest: Manifest, part: str, open_engine: Callable[[], DeviceEngine]) -> None:
        """Load the part with `open_engine`.

        Raises:
            EngineError: the part cannot be loaded.
        """
        self._lane, self._manifest, self._part = lane, manifest, part
        self._prepared: OrderedDict[tuple[tuple[int, ...], ...], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

        def load() -> DeviceEngine:
            with lane.enter():
                return open_engine()

        self._engine: DeviceEngine | None = lane.with_room(load)
        lane.add_engine()

    @property
    def device_engine(self) -> DeviceEngine:
        """The engine on the device, from which the denoiser makes contexts of its own.

        Raises:
            EngineError: the engine is closed.
        """
        if self._engine is None:
            raise EngineError(f"{self._part}: the engine is closed; load the pipeline again")
        return self._engine

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see `Engine.run`."""
        return self._lane.with_room(lambda: self._run(inputs))

    def unload_weights(self) -> bool:
        """Free the weights alone; see `UnloadableEngine`. Contexts and buffers stay."""
        with self._lock, self._lane.enter():
            engine = self.device_engine
            if not isinstance(engine, UnloadsWeights):
                return False
            self._lane.settle()
            return engine.unload_weights()

    def load_weights(self) -> None:
        """Load the weights again; see `UnloadableEngine`."""
        self._lane.with_room(self._load_weights)

    def close(self) -> None:
        """Free everything, after any run in another thread has finished."""
        with self._lock, self._lane.enter():
            self._lane.settle()
            while self._prepared:
                self._prepared.popitem()[1].close()
            if self._engine is not None:
                self._engine.close()
                self._engine = None
                self._lane.remove_engine()

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = {name: x.shape for name, x in inputs.items()}
        with self._lock:
            return self._prepare(shapes).run(inputs)

    def _load_weights(self) -> None:
        with self._lock, self._lane.enter():
            engine = self.device_engine
            assert isinstance(engine, UnloadsWeights), "called only after unload_weights returned True"
            engine.load_weights()

    def _prepare(self, shapes: Shapes) -> _Prepared:
        key = tuple(shapes.values())
        if key not in self._prepared:
            while len(self._prepared) >= _MAX_SHAPES:
                self._prepared.popitem(last=False)[1].close()
            with self._lane.enter() as stream:
                context = self.device_engine.context(shapes, stream)
                try:
                    self._prepared[key] = _Prepared(self._lane, self._manifest, self._part, shapes, context)
                except BaseException:
                    context.close()
                    raise
        self._prepared.move_to_end(key)
        return self._prepared[key]


class ProfiledHostEngine(HostEngine):
    """A `HostEngine` that times its layers; see `ProfiledEngine`."""

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far."""
        engine = self.device_engine
        assert isinstance(engine, TimesLayers), "the backend's open_profiled loads only engines that time their layers"
        return engine.layer_times()


class _Prepared:
    """The context and buffers for one set of shapes; pinned memory and device memory have the same layout."""

    def __init__(self, lane: Lane, manifest: Manifest, part: str, inputs: Shapes, context: Context) -> None:
        self._lane, self._part, self._context = lane, part, context
        self._generation: int | None = None
        self._inputs, self._outputs = host_arrays(manifest, part, inputs)
        total = self._inputs.nbytes + self._outputs.nbytes
        self._memory = lane.allocate(total, f"{part}: inputs and outputs")
        try:
            self._pinned: PinnedMemory = lane.allocate_pinned(total, part)
        except BaseException:
            self._memory.close()
            raise

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        split = self._inputs.nbytes
        for name, region in self._inputs.regions.items():
            region.view(self._pinned.array)[...] = inputs[name]
        addresses = {n: self._memory.address + r.offset for n, r in self._inputs.regions.items()}
        addresses |= {n: self._memory.address + split + r.offset for n, r in self._outputs.regions.items()}
        with self._lane.enter() as stream:
            self._bind()
            stream.copy(self._memory.address, self._pinned.address, split)
            self._context.enqueue(addresses, stream)
            stream.copy(self._pinned.address + split, self._memory.address + split, self._outputs.nbytes)
            done = self._lane.device.make_event()
            stream.record(done)
        done.wait()
        return {n: r.view(self._pinned.array[split:]).copy() for n, r in self._outputs.regions.items()}

    def close(self) -> None:
        with self._lane.enter():
            self._lane.settle()
            self._context.close()
            self._memory.close()
            self._pinned.close()

    def _bind(self) -> None:
        if self._context.workspace_bytes == 0:
            return
        workspace = self._lane.workspace(self._context.workspace_bytes, self._part)
        if self._generation != self._lane.generation:
            self._context.set_workspace(workspace.address, workspace.nbytes)
            self._generation = self._lane.generation
