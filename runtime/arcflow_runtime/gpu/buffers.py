"""The fixed memory of one plan: allocates it, writes a `DenoiseJob` into it, reads results, and gives device addresses.

Used by `plan.py`, whose CUDA graph has these addresses built in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from arcflow_runtime.disk.manifest import DType, Manifest
from arcflow_runtime.engines.denoiser import Denoised, DenoiseJob
from arcflow_runtime.gpu.arrays import PlanArrays, PlanKey, dtype_of
from arcflow_runtime.gpu.device import Memory, PinnedMemory
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.kernels import NoiseShape
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.layout import Layout, Region
from arcflow_runtime.gpu.loras import LoraArenas
from arcflow_runtime.maths.dtypes import cast


class Buffers:
    """Four allocations, each with named regions.

    - `staged`: inputs of each call, in pinned memory and on the device in the same layout, copied in one piece: noise
      `streams`, text `states`, the inputs of the modulation, and with guidance `negative_states` and `scale`.
    - `constant`: filled once: rotary tables, `sigmas`, `timesteps.<run>` or the modulation table.
    - `working`: on the device only: `latents` float32, which the update kernel changes in place; `input`, the same in
      the backbone's dtype unless that is float32; the backbone's outputs; intermediate results.
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
        arrays = PlanArrays(manifest, key, steps_at_once)
        #: Part -> shapes of its inputs, for each part that this plan runs.
        self.inputs = arrays.inputs
        #: Part -> shapes of the inputs of each context that this plan needs. The backbone has a second one if the
        #: negative prompts have another length than the prompts.
        self.contexts: dict[str, list[Shapes]] = {part: [shapes] for part, shapes in arrays.inputs.items()}
        if arrays.negative is not None and arrays.negative != arrays.inputs["backbone"]:
            self.contexts["backbone"].append(arrays.negative)
        #: Part -> device addresses of the inputs of its LoRA slots.
        self.slots = {part: arenas.addresses(part, key.lora_rank) for part in self.inputs}
        #: First step of every run of the conditioner.
        self.starts = arrays.starts
        self.staged, self._constant, self._working = arrays.staged, arrays.constant, arrays.working
        regions = {name: self._working[name] for name in ("latents", "images") if name in self._working}
        self.results = Layout.of({name: (r.shape, r.dtype) for name, r in regions.items()})
        self._texts: Sequence[object] = ()
        self._negatives: Sequence[object] = ()
        self._modulation: np.ndarray | None = None
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
        return dtype_of(self._manifest, "backbone", "latents")

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
            modulation: [S, b, M] or [S, 1, M] if the key's `modulation` is "given", else None. The caller must not
                change it afterwards.
        """
        self._put("streams", job.streams)
        # Embeddings are read-only, so the same objects as last time have the same values and are not copied again.
        if not _same(self._texts, job.texts):
            self._put_rows("states", [text.states for text in job.texts])
            if "pooled" in self.staged:
                self._put_rows("pooled", [text.pooled for text in job.texts])
            self._texts = tuple(job.texts)
        if (negative := job.negative) is not None:
            if not _same(self._negatives, negative.texts):
                self._put_rows("negative_states", [text.states for text in negative.texts])
                self._negatives = tuple(negative.texts)
            self._staging("scale")[...] = negative.scale
        if "guidance" in self.staged:
            self._staging("guidance")[...] = job.guidance
        if modulation is not None and modulation is not self._modulation:
            self._put("modulations", modulation)
            self._modulation = modulation

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

    def _upload_constants(self, job: DenoiseJob) -> None:
        values: Mapping[str, np.ndarray | None] = {
            "image_rotary": job.image_rotary,
            "text_rotary": job.text_rotary,
            "negative_rotary": None if job.negative is None else job.negative.text_rotary,
            "sigmas": job.sigmas,
            "modulations": None if job.table is None else job.table[:, None],
            **{f"timesteps.{run}": job.timesteps[start:] for run, start in enumerate(self.starts)},
        }
        pinned = self._lane.allocate_pinned(self._constant.nbytes, "backbone")
        try:
            for name, region in self._constant.regions.items():
                value = values[name]
                assert value is not None, "a key has only what its jobs have"
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
