"""TensorRT and TensorRT-RTX: the engines that `arcflow build` made beside a bundle -> parts and a denoiser on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.store import BuiltEngine, Host, build_command, find_engine, this_host
from arcflow_runtime.engines.tensorrt_library import LIBRARIES
from arcflow_runtime.errors import RequestError
from arcflow_runtime.gpu.denoiser import DeviceDenoiser
from arcflow_runtime.gpu.device import Device
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.host import HostEngine, ProfiledHostEngine
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.tensorrt import Options, TensorRTEngine, misfit


class TensorRTBackend:
    """Opens parts with one of the two libraries, all on one GPU and in one stream."""

    def __init__(self, name: str, open_device: Callable[[], Device], options: Options = Options()) -> None:  # noqa: B008
        """`name` is a key of `trt.library.LIBRARIES`; the device is opened when it is first needed."""
        self._library = LIBRARIES[name]
        self._open_device, self._options = open_device, options
        self._host: Host | None = None
        self._lane: Lane | None = None
        self._found: dict[tuple[Path, str], BuiltEngine] = {}

    def check(self, bundle: Bundle) -> None:
        """Find an engine for this machine of every part, before any is loaded (rules E4, E5).

        Raises:
            EngineError: there is no library, driver or GPU; or no engine that fits, with the command to build one.
        """
        for part in bundle.manifest.parts:
            self._find(bundle, part)

    def open(self, bundle: Bundle, part: str) -> HostEngine:
        """Load a part's engine.

        Raises:
            EngineError: it does not fit this machine or cannot be loaded.
        """
        lane = self._get_lane()
        return HostEngine(lane, bundle.manifest, part, lambda: self._load(lane, bundle, part, self._options))

    def open_profiled(self, bundle: Bundle, part: str) -> ProfiledHostEngine:
        """Load a part's engine so that it times its layers; see `ProfilingBackend`."""
        lane, options = self._get_lane(), replace(self._options, profile=True)
        return ProfiledHostEngine(lane, bundle.manifest, part, lambda: self._load(lane, bundle, part, options))

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> DeviceDenoiser:
        """Draw with this backend's engines of `bundle`, which `parts` opens; see `DenoisingBackend`."""

        def limits(part: str, shapes: Shapes) -> str | None:
            wrong = misfit(part, self._find(bundle, part).record.key.profiles, shapes)
            if wrong is None:
                return None
            command = build_command(bundle, part, self._this_host())
            return f"{wrong}; {command} with --resolutions and --batch that include it"

        return DeviceDenoiser(bundle, parts, self._get_lane(), limits)

    def _load(self, lane: Lane, bundle: Bundle, part: str, options: Options) -> TensorRTEngine:
        return TensorRTEngine(self._library, lane, bundle, self._find(bundle, part), options)

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
    """The backend of the library `name`.

    `ARCFLOW_RTX_GRAPHS=1` in the environment lets TensorRT-RTX capture each engine's runs itself, instead of one graph
    of the whole picture.

    Raises:
        RequestError: `threads` is given, which is for backends on a CPU.
    """
    if threads is not None:
        raise RequestError(f"threads is for backends that run on a CPU, got {threads} for {name}; leave it out")
    from arcflow_runtime.gpu.cuda import open_device

    own_graphs = os.environ.get("ARCFLOW_RTX_GRAPHS") == "1" and LIBRARIES[name].ahead_of_time
    return TensorRTBackend(name, open_device, Options(own_graphs=own_graphs))
