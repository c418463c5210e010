"""The backends "tensorrt" and "tensorrt-rtx": load the engines that `arcflow build` made, and make the denoiser."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.modes import TENSORRT, EngineBytes
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.store import BuiltEngine, Host, build_command, engine_bytes, find_engine, this_host
from arcflow_runtime.engines.tensorrt_library import LIBRARIES
from arcflow_runtime.errors import RequestError
from arcflow_runtime.gpu.denoiser import DeviceDenoiser
from arcflow_runtime.gpu.device import Device
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.host import HostEngine, ProfiledHostEngine
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.tensorrt import TensorRTEngine, TensorRTOptions, shape_mismatch


class TensorRTBackend:
    """Loads parts with one of the two libraries, all on one GPU and in one stream."""

    memory_rules = TENSORRT

    def __init__(
        self,
        name: str,
        open_device: Callable[[], Device],
        options: TensorRTOptions = TensorRTOptions(),  # noqa: B008
    ) -> None:
        """Args: `name` is a key of `LIBRARIES`; `open_device` is called when the device is first needed."""
        self._library = LIBRARIES[name]
        self._open_device, self._options = open_device, options
        self._host: Host | None = None
        self._lane: Lane | None = None
        self._found: dict[tuple[Path, str], BuiltEngine] = {}
        self._loaded: WeakValueDictionary[tuple[Path, str], TensorRTEngine] = WeakValueDictionary()

    def check(self, bundle: Bundle) -> None:
        """Find the engine of every part for this machine, before any is loaded (rules E4, E5).

        Raises:
            EngineError: the library, the driver or a GPU is missing, or a part has no engine for this machine; the
                message gives the command to build it.
        """
        for part in bundle.manifest.parts:
            self._find(bundle, part)

    def open(self, bundle: Bundle, part: str) -> HostEngine:
        """Load a part's engine.

        Raises:
            EngineError: there is no engine for this machine, or it cannot be loaded.
        """
        return self._open(bundle, part, self._options)

    def open_unloadable(self, bundle: Bundle, part: str) -> HostEngine:
        """Load a part's engine so that its weights can be freed alone; see `UnloadingBackend`."""
        return self._open(bundle, part, replace(self._options, unloadable=True))

    def free_bytes(self) -> int:
        """Free memory of the GPU; see `MeasuredBackend`."""
        return self._get_lane().free_bytes()

    def built_bytes(self, bundle: Bundle, part: str) -> EngineBytes:
        """What the part's engine takes; see `MeasuredBackend`."""
        return engine_bytes(bundle, self._find(bundle, part).record)

    def open_profiled(self, bundle: Bundle, part: str) -> ProfiledHostEngine:
        """Load a part's engine with layer timing; see `ProfilingBackend`."""
        lane, options = self._get_lane(), replace(self._options, profile=True)
        return ProfiledHostEngine(lane, bundle.manifest, part, lambda: self._load(lane, bundle, part, options))

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> DeviceDenoiser:
        """The denoiser that runs the engines of `parts`; see `DenoisingBackend`."""

        def check_shapes(part: str, shapes: Shapes) -> str | None:
            wrong = shape_mismatch(part, self._find(bundle, part).record.key.profiles, shapes)
            if wrong is None:
                return None
            command = build_command(bundle, part, self._this_host())
            return f"{wrong}; {command} with --resolutions and --batch that include it"

        return DeviceDenoiser(bundle, parts, self._get_lane(), check_shapes)

    def _open(self, bundle: Bundle, part: str, options: TensorRTOptions) -> HostEngine:
        lane = self._get_lane()
        return HostEngine(lane, bundle.manifest, part, lambda: self._load(lane, bundle, part, options))

    def _load(self, lane: Lane, bundle: Bundle, part: str, options: TensorRTOptions) -> TensorRTEngine:
        share = self._share(bundle, part)
        engine = TensorRTEngine(self._library, lane, bundle, self._find(bundle, part), options, share)
        self._loaded[bundle.root, part] = engine
        return engine

    def _share(self, bundle: Bundle, part: str) -> tuple[int, int]:
        """Bytes of a part's weights, and of those of all parts that are not loaded yet, this part included."""
        files = bundle.manifest.files
        nbytes = {name: files[spec.weights].bytes for name, spec in bundle.manifest.parts.items()}
        loaded = {name for name in nbytes if (engine := self._loaded.get((bundle.root, name))) and engine.is_open}
        return nbytes[part], sum(nbytes[name] for name in nbytes.keys() - loaded | {part})

    def _find(self, bundle: Bundle, part: str) -> BuiltEngine:
        key = (bundle.root, part)
        if key not in self._found:
            self._found[key] = find_engine(bundle, part, self._this_host())
        return self._found[key]

    def _this_host(self) -> Host:
        if self._host is None:
            self._host = this_host(self._library.name)
        return self._host

    def _get_lane(self) -> Lane:
        if self._lane is None:
            self._lane = Lane(self._open_device())
        return self._lane


def create(threads: int | None, name: str = "tensorrt") -> TensorRTBackend:
    """Create the backend of the library `name`.

    With the environment variable `ARCFLOW_RTX_GRAPHS=1`, TensorRT-RTX captures each engine's runs itself, in place of
    one graph of the whole job.

    Raises:
        RequestError: `threads` is given; only backends on a CPU take it.
    """
    if threads is not None:
        raise RequestError(f"threads is for backends that run on a CPU, got {threads} for {name}; leave it out")
    from arcflow_runtime.gpu.cuda import open_device

    own_graphs = os.environ.get("ARCFLOW_RTX_GRAPHS") == "1" and LIBRARIES[name].ahead_of_time
    return TensorRTBackend(name, open_device, TensorRTOptions(own_graphs=own_graphs))
