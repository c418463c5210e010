"""Add up the memory that a pipeline needs: bundle, image size and mode -> bytes by part and by stage.

Weights and buffers come from the manifest, and activations from the parts' graphs (`activations.py`) or, where an
engine's record has them, from there. No engine is opened. `Pipeline.load` chooses the mode by these sums, and `arcflow
inspect --gpu-memory` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.dtypes import ITEM_BYTES
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.signatures import signature
from arcflow_runtime.engines.modes import EVERY_IMAGE, MODES, EngineBytes, MemoryMode, MemoryRules, keeps
from arcflow_runtime.gpu.arrays import PlanArrays, PlanKey, host_arrays, modulation_source
from arcflow_runtime.gpu.layout import Layout
from arcflow_runtime.gpu.shapes import (
    DenoiseShape,
    backbone_inputs,
    conditioner_inputs,
    decoder_inputs,
    encoder_inputs,
)
from arcflow_runtime.memory.activations import PartGraph

if TYPE_CHECKING:
    from arcflow_runtime.gpu.engine import Shapes

#: Name of the time between two images, beside the stages, which are called by their part.
BETWEEN = "between images"
#: Regions of a plan that hold what the update reads and writes.
_UPDATE = ("latents", "input", "means", "logweights", "loggammas", "velocity", "negative_velocity", "sigmas")


@dataclass(frozen=True)
class ImageSize:
    """One call: B images of one size, whose texts have T states, in S steps."""

    batch: int
    height_px: int
    width_px: int
    text_tokens: int
    steps: int


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one part.

    Args:
        weights: of its engine or weights file.
        activations: a bound, or None if the graph does not tell.
        arrays: its inputs and outputs, when it runs on host arrays.
    """

    weights: int
    activations: int | None
    arrays: int


@dataclass(frozen=True)
class PlanBytes:
    """Bytes of the arrays of one size: `update` holds latents, heads or velocity, and sigmas, `buffers` all others."""

    buffers: int
    update: int


@dataclass(frozen=True)
class Sums:
    """The bytes of every part and plan for one size.

    `plans` is by mode, because the modulation comes from another place in each. `runs` has the parts that run, in
    order, and `by_host` those of them that run on host arrays, outside the graph.
    """

    size: ImageSize
    rules: MemoryRules
    parts: Mapping[str, PartBytes]
    plans: Mapping[MemoryMode, PlanBytes]
    runs: Mapping[MemoryMode, tuple[str, ...]]
    by_host: Mapping[MemoryMode, tuple[str, ...]]

    @property
    def complete(self) -> bool:
        """False if the activations of a part are unknown and counted as 0."""
        return all(p.activations is not None for p in self.parts.values())

    def peak(self, mode: MemoryMode) -> int:
        """The most bytes that are held at one time."""
        return max(self.stages(mode).values())

    def stages(self, mode: MemoryMode) -> dict[str, int]:
        """Bytes held while each part runs, and between images, once an image of this size was generated."""
        plan = self.plans[mode].buffers + self.plans[mode].update
        if mode == "low":
            return self._one_at_a_time(plan)
        held = plan + sum(self.parts[p].arrays for p in self.by_host[mode])
        held += sum(self._loaded(p) for p in self.parts if keeps(mode, p))
        if self.rules.one_workspace:
            held += max(map(self._activations, self.runs[mode]))
        brought = {p: 0 if keeps(mode, p) else self._loaded(p) for p in self.runs[mode]}
        return {p: held + nbytes for p, nbytes in brought.items()} | {BETWEEN: held}

    def _one_at_a_time(self, plan: int) -> dict[str, int]:
        stages = {}
        for part in self.runs["low"]:
            arrays = self.parts[part].arrays if part in self.by_host["low"] else 0
            stages[part] = plan + self.parts[part].weights + self._activations(part) + arrays
        return stages | {BETWEEN: plan}

    def _loaded(self, part: str) -> int:
        """Bytes that a part takes as long as it is loaded."""
        own = 0 if self.rules.one_workspace else self._activations(part)
        return self.parts[part].weights + own

    def _activations(self, part: str) -> int:
        return self.parts[part].activations or 0


@dataclass
class BundleMemory:
    """Makes the sums of one bundle for any size; reads each part's graph once, when first needed."""

    bundle: Bundle
    rules: MemoryRules
    built: Mapping[str, EngineBytes] = field(default_factory=dict)
    _graphs: dict[str, PartGraph | None] = field(default_factory=dict)

    def sums(self, size: ImageSize) -> Sums:
        """The sums for one size.

        Raises:
            BundleError: a graph cannot be read.
        """
        m = self.bundle.manifest
        activations = {part: self._activations(part, inputs) for part, inputs in part_inputs(m, size).items()}
        return make_sums(m, size, self.rules, self._weights(), activations)

    def _weights(self) -> dict[str, int]:
        m = self.bundle.manifest
        return {
            part: self.built[part].weights if part in self.built else weight_bytes(m, part, self.rules)
            for part in m.parts
        }

    def _activations(self, part: str, inputs: Shapes) -> int | None:
        if part in self.built and (known := self.built[part].activations_for(inputs)) is not None:
            return known
        if part not in self._graphs:
            self._graphs[part] = PartGraph.read(self.bundle, part)
        graph = self._graphs[part]
        return None if graph is None else graph.activation_bytes(inputs, self.rules)


def make_sums(
    manifest: Manifest,
    size: ImageSize,
    rules: MemoryRules,
    weights: Mapping[str, int],
    activations: Mapping[str, int | None],
) -> Sums:
    """The sums for one size, from the bytes of every part's weights and activations."""
    shape, inputs = _shape(manifest, size), part_inputs(manifest, size)
    in_table = manifest.modulation is not None and size.steps in manifest.modulation.num_inference_steps
    encoders = tuple(p for p in manifest.parts if signature(manifest.family, p).input("input_ids") is not None)
    # The graph's parts read LoRAs from one array, which is filled from a copy for each set.
    slots = [manifest.parts[p].lora for p in ("conditioner", *EVERY_IMAGE) if p in manifest.parts]
    rank = max((s.rank_multiple for s in slots if s is not None), default=0)
    loras = 2 * sum(Layout.of(s.shapes({}, rank)).nbytes for s in slots if s is not None)
    # If the bundle can be guided, the negative prompt is counted, as long as the prompt.
    away = 0 if manifest.true_cfg_scale is None else size.text_tokens
    plans: dict[MemoryMode, PlanBytes] = {}
    runs: dict[MemoryMode, tuple[str, ...]] = {}
    by_host: dict[MemoryMode, tuple[str, ...]] = {}
    for mode in MODES:
        source = modulation_source(manifest, in_table, keeps(mode, "conditioner"))
        arrays = PlanArrays(manifest, PlanKey(shape, True, source, rank, away), size.steps)
        regions = [r for layout in (arrays.constant, arrays.working) for r in layout.regions.items()]
        update = sum(region.nbytes for name, region in regions if name in _UPDATE)
        plans[mode] = PlanBytes(arrays.nbytes - update + loras, update)
        conditioner = () if source == "table" else ("conditioner",)
        runs[mode] = (*encoders, *conditioner, *EVERY_IMAGE)
        by_host[mode] = (*encoders, *conditioner) if source == "given" else encoders
    parts = {
        part: PartBytes(
            weights[part],
            activations[part],
            sum(layout.nbytes for layout in host_arrays(manifest, part, inputs[part])),
        )
        for part in manifest.parts
    }
    return Sums(size, rules, parts, plans, runs, by_host)


def part_inputs(manifest: Manifest, size: ImageSize) -> dict[str, Shapes]:
    """The shapes of every part's inputs. Text encoders run one prompt at a time."""
    shape = _shape(manifest, size)
    made = {
        "conditioner": lambda: conditioner_inputs(manifest, size.batch, size.steps),
        "backbone": lambda: backbone_inputs(manifest, shape),
        "vae_decoder": lambda: decoder_inputs(manifest, shape),
    }
    inputs = {p: made[p]() if p in made else encoder_inputs(manifest, p, size.text_tokens) for p in manifest.parts}
    return {p: {**shapes, **_slots(manifest, p)} for p, shapes in inputs.items()}


def _slots(manifest: Manifest, part: str) -> Shapes:
    """The inputs of a part's LoRA slots at the least rank, at which they hold no LoRA."""
    slots = manifest.parts[part].lora
    return {} if slots is None else {n: shape for n, (shape, _) in slots.shapes({}, slots.rank_multiple).items()}


def weight_bytes(manifest: Manifest, part: str, rules: MemoryRules) -> int:
    """Bytes of a part's weights where there is no engine: of its file, and of a copy in the library's own dtype."""
    spec = manifest.parts[part]
    stored = manifest.files[spec.weights].bytes
    if spec.quantization is not None or ITEM_BYTES[spec.precision] >= rules.least_item_bytes:
        return stored
    return stored + rules.least_item_bytes * spec.parameters


def _shape(manifest: Manifest, size: ImageSize) -> DenoiseShape:
    token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor
    grid = (size.height_px // token_px, size.width_px // token_px)
    return DenoiseShape(size.batch, grid, size.text_tokens, size.steps)
