"""The fixed memory of one plan: allocates it, writes a `DenoiseJob` into it, reads results, and gives device addresses.

Used by `plan.py`, whose CUDA graph has these addresses built in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from arcflow_runtime.disk.manifest import DType, Manifest
from arcflow_runtime.engines.denoiser import Denoised, DenoiseJob
from arcflow_runtime.gpu.device import Memory, PinnedMemory
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.kernels import NoiseShape
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.layout import Layout, Region, StoredDType
from arcflow_runtime.gpu.loras import LoraArenas
from arcflow_runtime.gpu.shapes import DenoiseShape, backbone_inputs, conditioner_inputs, decoder_inputs, output_shapes
from arcflow_runtime.maths.dtypes import cast

#: Where the modulation comes from: the conditioner run on the device, the bundle's table, or the host at each call.
Modulation = Literal["conditioner", "table", "given"]
#: Name of an array -> its shape and dtype.
ArraySpecs = dict[str, tuple[tuple[int, ...], StoredDType]]


@dataclass(frozen=True)
class PlanKey:
    """What a plan is made for. A job runs with the plan of exactly its own key.

    `lora_rank` is the rank of the arena that the engines read their LoRAs from; 0 if they have no slots.
    """

    size: DenoiseShape
    pixels: bool
    modulation: Modulation
    lora_rank: int = 0


class Buffers:
    """Four allocations, each with named regions.

    - `staged`: inputs of each call, in pinned memory and on the device in the same layout, copied in one piece: noise
      `streams`, text `states`, and the inputs of the modulation.
    - `constant`: filled once: rotary tables, `sigmas`, `timesteps.<run>` or the modulation table.
    - `working`: on the device only: `latents` float32, which the update kernel changes in place; `input`, the same in
      the backbone's dtype unless that is float32; the heads; intermediate results.
    - `results`: pinned memory for `latents` and `images`.
    """

    def __init__(
        self,
        lane: Lane,
        manifest: Manifest,
        key: PlanKey,
        steps_at_once: int,
        job: DenoiseJob,
        arenas: LoraArenas,
    ) -> None:
        """Allocate everything and fill in the constants, which are equal for all jobs of this key.

        Args:
            lane: allocates the memory.
            manifest: the bundle's.
            key: what the plan is made for.
            steps_at_once: timesteps per run of the conditioner, at most S.
            job: any job of this key; gives the tables and the schedule.
            arenas: hold the LoRAs.

        Raises:
            OutOfDeviceMemory: there is not enough memory; nothing stays allocated.
        """
        self._manifest, self._key, self._lane = manifest, key, lane
        size = key.size
        #: Part -> shapes of its inputs, for each part that this plan runs.
        self.inputs: dict[str, Shapes] = {"backbone": backbone_inputs(manifest, size)}
        if key.modulation == "conditioner":
            self.inputs["conditioner"] = conditioner_inputs(manifest, size.batch, steps_at_once)
        if key.pixels:
            self.inputs["vae_decoder"] = decoder_inputs(manifest, size)
        for part, shapes in self.inputs.items():
            self.inputs[part] = {**shapes, **arenas.shapes(part, key.lora_rank)}
        #: Part -> device addresses of the inputs of its LoRA slots.
        self.slots = {part: arenas.addresses(part, key.lora_rank) for part in self.inputs}
        #: First step of every run of the conditioner. All runs have the same length, so that one context serves them
        #: all; the last two overlap if the length does not divide S.
        self.starts = [*range(0, size.steps - steps_at_once, steps_at_once), size.steps - steps_at_once]
        self.staged, self._constant = Layout.of(self._staged_arrays()), Layout.of(self._constant_arrays())
        self._working = Layout.of(self._working_arrays())
        regions = {name: self._working[name] for name in ("latents", "images") if name in self._working}
        self.results = Layout.of({name: (r.shape, r.dtype) for name, r in regions.items()})
        self._texts: Sequence[object] = ()
        layouts = (self.staged, self._constant, self._working)
        self._memory: list[Memory] = []
        self._pinned: list[PinnedMemory] = []
        try:
            for layout in layouts:
                self._memory.append(lane.allocate(layout.nbytes, "backbone: inputs and outputs"))
            for layout in (self.staged, self.results):
                self._pinned.append(lane.allocate_pinned(layout.nbytes, "backbone"))
            self._upload_constants(job)
        except BaseException:
            self.close()
            raise
        self._addresses = {
            name: memory.address + region.offset
            for layout, memory in zip(layouts, self._memory, strict=True)
            for name, region in layout.regions.items()
        }
        self._regions = {name: region for layout in layouts for name, region in layout.regions.items()}

    def __getitem__(self, name: str) -> int:
        """The address of a region on the device."""
        return self._addresses[name]

    def __contains__(self, name: str) -> bool:
        return name in self._regions

    def region(self, name: str) -> Region:
        """The region called `name` on the device."""
        return self._regions[name]

    @property
    def input_dtype(self) -> DType:
        """The dtype of the backbone's input `latents`."""
        return self._dtype("backbone", "latents")

    @property
    def engine_input(self) -> int:
        """The device address of `input`, or 0 if the backbone reads the float32 latents."""
        return self._addresses.get("input", 0)

    def noise_shape(self) -> NoiseShape:
        """The sizes of this plan's noise, for the noise kernel."""
        latents, (height, width) = self._manifest.latents, self._key.size.grid
        p = latents.patch_size
        return NoiseShape(self._key.size.batch, latents.channels, height * p, width * p, p, self.input_dtype)

    @property
    def staging_address(self) -> int:
        """The address of `staged` in pinned memory."""
        return self._pinned[0].address

    def result_address(self, name: str) -> int:
        """The address of a result in pinned memory."""
        return self._pinned[1].address + self.results[name].offset

    def stage(self, job: DenoiseJob, modulation: np.ndarray | None = None) -> None:
        """Write a job's inputs into pinned memory.

        Args:
            job: a job of this plan's key.
            modulation: [S, b, M] or [S, 1, M] if the key's `modulation` is "given", else None.
        """
        self._put("streams", job.streams)
        # Embeddings are read-only, so the same objects as last time have the same values and are not copied again.
        if not _same(self._texts, job.texts):
            self._put_rows("states", [text.states for text in job.texts])
            if "pooled" in self.staged:
                self._put_rows("pooled", [text.pooled for text in job.texts])
            self._texts = tuple(job.texts)
        if "guidance" in self.staged:
            self._staging("guidance")[...] = job.guidance
        if modulation is not None:
            self._put("modulations", modulation)

    def read_latents(self) -> np.ndarray:
        """A copy of the latents in `results`."""
        return self._read("latents")

    def read(self) -> Denoised:
        """Copies of all results."""
        return Denoised(self._read("latents"), self._read("images") if self._key.pixels else None)

    def close(self) -> None:
        """Free everything. The stream must be idle."""
        for memory in (*self._memory, *self._pinned):
            memory.close()
        self._memory, self._pinned = [], []

    def _dtype(self, part: str, name: str) -> DType:
        spec = self._manifest.parts[part]
        return next(s.dtype for s in spec.inputs + spec.outputs if s.name == name)

    def _modulations(self, rows: int) -> tuple[tuple[int, ...], StoredDType]:
        """Shape and dtype of the modulation of all steps: [S, rows, M] in the dtype of the backbone's input."""
        width = self.inputs["backbone"]["modulation"][1]
        return (self._key.size.steps, rows, width), self._dtype("backbone", "modulation")

    def _staged_arrays(self) -> ArraySpecs:
        inputs, conditioner = self.inputs["backbone"], self.inputs.get("conditioner", {})
        arrays: ArraySpecs = {"streams": ((self._key.size.batch, 2), "int64")}
        arrays["states"] = (inputs["encoder_hidden_states"], self._dtype("backbone", "encoder_hidden_states"))
        if self._key.modulation == "given":
            arrays["modulations"] = self._modulations(self._key.size.batch)
        for short, name in (("pooled", "pooled_projections"), ("guidance", "guidance")):
            if name in conditioner:
                arrays[short] = (conditioner[name], self._dtype("conditioner", name))
        return arrays

    def _constant_arrays(self) -> ArraySpecs:
        inputs = self.inputs["backbone"]
        arrays: ArraySpecs = {n: (inputs[n], self._dtype("backbone", n)) for n in ("image_rotary", "text_rotary")}
        arrays["sigmas"] = ((self._key.size.steps + 1,), "float64")
        if self._key.modulation == "table":
            arrays["modulations"] = self._modulations(1)
        if self._key.modulation == "conditioner":
            shape = self.inputs["conditioner"]["timesteps"]
            arrays |= {f"timesteps.{run}": (shape, "float32") for run in range(len(self.starts))}
        return arrays

    def _working_arrays(self) -> ArraySpecs:
        inputs = self.inputs
        heads = output_shapes(self._manifest, "backbone", inputs["backbone"])
        arrays: ArraySpecs = {"latents": (inputs["backbone"]["latents"], "float32")}
        if self.input_dtype != "float32":
            arrays["input"] = (inputs["backbone"]["latents"], self.input_dtype)
        arrays |= {name: (shape, self._dtype("backbone", name)) for name, shape in heads.items()}
        arrays["modulation"] = (inputs["backbone"]["modulation"], self._dtype("backbone", "modulation"))
        if self._key.modulation == "conditioner":
            made = output_shapes(self._manifest, "conditioner", inputs["conditioner"])["modulation"]
            arrays["conditioned"] = (made, self._dtype("conditioner", "modulation"))
            arrays["modulations"] = self._modulations(made[1])
        if self._key.pixels:
            images = output_shapes(self._manifest, "vae_decoder", inputs["vae_decoder"])["images"]
            arrays["images"] = (images, "uint8")
        return arrays

    def _upload_constants(self, job: DenoiseJob) -> None:
        values: Mapping[str, np.ndarray | None] = {
            "image_rotary": job.image_rotary,
            "text_rotary": job.text_rotary,
            "sigmas": job.sigmas,
            "modulations": None if job.table is None else job.table[:, None],
            **{f"timesteps.{run}": job.timesteps[start:] for run, start in enumerate(self.starts)},
        }
        pinned = self._lane.allocate_pinned(self._constant.nbytes, "backbone")
        try:
            for name, region in self._constant.regions.items():
                value = values[name]
                assert value is not None, "modulation is 'table' only if the bundle has one"
                region.view(pinned.array)[...] = cast(value, region.dtype)[: region.shape[0]]
            with self._lane.enter() as stream:
                stream.copy(self._memory[1].address, pinned.address, self._constant.nbytes)
                stream.wait()
        finally:
            self._lane.settle()
            pinned.close()

    def _staging(self, name: str) -> np.ndarray:
        return self.staged[name].view(self._pinned[0].array)

    def _put(self, name: str, array: np.ndarray) -> None:
        self._staging(name)[...] = cast(array, self.staged[name].dtype)

    def _put_rows(self, name: str, rows: Sequence[np.ndarray | None]) -> None:
        for target, row in zip(self._staging(name), rows, strict=True):
            assert row is not None, "a bundle whose conditioner takes pooled text has an encoder that gives it"
            target[...] = cast(row, self.staged[name].dtype)[0]

    def _read(self, name: str) -> np.ndarray:
        return self.results[name].view(self._pinned[1].array).copy()


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
