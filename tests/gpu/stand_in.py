"""The runtime's own denoiser around other engines: a function that makes an engine of a part -> `DeviceDenoiser`.

`CopyEngine` is such an engine, made of copies on the device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.gpu.denoiser import DeviceDenoiser
from arcflow_runtime.gpu.device import Device, Stream
from arcflow_runtime.gpu.engine import DeviceEngine, Shapes
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.shapes import output_shapes
from arcflow_runtime.maths.dtypes import NUMPY

#: Name of a part -> its engine.
MakeEngine = Callable[[str], DeviceEngine]
Arrays = dict[str, "np.ndarray[Any, Any]"]


class StandInBackend:
    """A backend whose engines come from a function."""

    def __init__(self, lane: Lane, make_engine: MakeEngine) -> None:
        self._lane, self._make_engine = lane, make_engine

    def check(self, bundle: Bundle) -> None:
        """See `Backend.check`."""

    def open(self, bundle: Bundle, part: str) -> HostEngine:
        """See `Backend.open`."""
        return HostEngine(self._lane, bundle.manifest, part, lambda: self._make_engine(part))


def open_denoiser(device: Device, bundle: Bundle, make_engine: MakeEngine) -> tuple[DeviceDenoiser, Parts]:
    """The denoiser, and the parts to close after it."""
    lane = Lane(device)
    parts = Parts(bundle, StandInBackend(lane, make_engine), "resident")
    return DeviceDenoiser(bundle, parts, lane, lambda part, shapes: None), parts


def copied(part: str, inputs: Arrays, outputs: Shapes) -> Arrays:
    """What `CopyEngine` computes, in numpy: each output repeats one input's numbers.

    The modulation repeats the pooled text, and its first numbers are the timesteps. A velocity repeats the text; its
    second half is that of the latents, and its first quarter has numbers of the modulation. So the result of an image
    depends on each input that changes from call to call.
    """
    if part == "conditioner":
        made = np.resize(inputs["pooled_projections"], outputs["modulation"])
        made.reshape(-1)[: inputs["timesteps"].size] = inputs["timesteps"]
        return {"modulation": made}
    if "velocity" in outputs:
        made = np.resize(inputs["encoder_hidden_states"], outputs["velocity"])
        flat, modulation = made.reshape(-1), inputs["modulation"].reshape(-1)
        flat[flat.size // 2 :] = inputs["latents"].reshape(-1)[flat.size // 2 :]
        few = min(flat.size // 4, modulation.size)
        flat[:few] = modulation[:few]
        return {"velocity": made}
    sources = {"means": "latents", "logweights": "modulation", "loggammas": "encoder_hidden_states"}
    return {name: np.resize(inputs[source], outputs[name]) for name, source in sources.items()}


class CopyEngine:
    """An engine that computes `copied` by copies, through its workspace; implements `engine.DeviceEngine`."""

    def __init__(self, manifest: Manifest, part: str) -> None:
        self.manifest, self.part = manifest, part

    def context(self, inputs: Shapes, stream: Stream) -> CopyContext:
        """See `DeviceEngine.context`."""
        return CopyContext(self, inputs)

    def close(self) -> None:
        """See `DeviceEngine.close`."""


class CopyContext:
    """See `CopyEngine`; implements `engine.Context`."""

    def __init__(self, engine: CopyEngine, inputs: Shapes) -> None:
        spec = engine.manifest.parts[engine.part]
        shapes = {**inputs, **output_shapes(engine.manifest, engine.part, inputs)}
        self._part = engine.part
        self._nbytes = {
            s.name: int(np.prod(shapes[s.name])) * np.dtype(NUMPY[s.dtype]).itemsize for s in spec.inputs + spec.outputs
        }
        self._workspace = 0
        self.workspace_bytes = max(self._nbytes.values())

    def set_workspace(self, address: int, nbytes: int) -> None:
        """See `Context.set_workspace`."""
        assert nbytes >= self.workspace_bytes
        self._workspace = address

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """See `Context.enqueue`."""
        assert set(addresses) == set(self._nbytes), f"{self._part}: {sorted(addresses)}"
        if self._part == "conditioner":
            self._repeat(addresses, stream, "pooled_projections", "modulation")
            stream.copy(addresses["modulation"], addresses["timesteps"], self._nbytes["timesteps"])
            return
        if "velocity" in addresses:
            self._repeat(addresses, stream, "encoder_hidden_states", "velocity")
            half = self._nbytes["velocity"] // 2
            stream.copy(addresses["velocity"] + half, addresses["latents"] + half, half)
            stream.copy(addresses["velocity"], addresses["modulation"], min(half // 2, self._nbytes["modulation"]))
            return
        self._repeat(addresses, stream, "latents", "means")
        self._repeat(addresses, stream, "modulation", "logweights")
        self._repeat(addresses, stream, "encoder_hidden_states", "loggammas")

    def obstacle(self, stream: Stream) -> str | None:
        """See `Context.obstacle`."""
        return None

    def close(self) -> None:
        """See `Context.close`."""

    def _repeat(self, addresses: Mapping[str, int], stream: Stream, source: str, target: str) -> None:
        """Fill `target` with copies of `source`, each as long as all before it, in the workspace."""
        wanted = self._nbytes[target]
        done = min(self._nbytes[source], wanted)
        stream.copy(self._workspace, addresses[source], done)
        while done < wanted:
            more = min(done, wanted - done)
            stream.copy(self._workspace + done, self._workspace, more)
            done += more
        stream.copy(addresses[target], self._workspace, wanted)
