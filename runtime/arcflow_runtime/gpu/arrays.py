"""The arrays on the device for one plan, and for a part that runs on host arrays: manifest and sizes -> layouts.

`buffers.py` and `host.py` allocate them, and `memory/sums.py` adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from arcflow_runtime.disk.manifest import DType, Manifest
from arcflow_runtime.gpu.layout import Layout, StoredDType
from arcflow_runtime.gpu.shapes import DenoiseShape, backbone_inputs, conditioner_inputs, decoder_inputs, output_shapes

if TYPE_CHECKING:
    from arcflow_runtime.gpu.engine import Shapes

#: Where the modulation comes from: the conditioner run on the device, the bundle's table, or the host at each call.
Modulation = Literal["conditioner", "table", "given"]
#: Name of an array -> its shape and dtype.
ArraySpecs = dict[str, tuple[tuple[int, ...], StoredDType]]


@dataclass(frozen=True)
class PlanKey:
    """What a plan is made for. A job runs with the plan of exactly its own key.

    `lora_rank` is the rank of the arena that the engines read their LoRAs from; 0 if they have no slots.
    `negative_tokens` is T' of the negative prompts; 0 if the velocity is not guided.
    """

    size: DenoiseShape
    pixels: bool
    modulation: Modulation
    lora_rank: int = 0
    negative_tokens: int = 0


def modulation_source(manifest: Manifest, in_table: bool, kept: bool) -> Modulation:
    """Where a plan takes its modulation from.

    Args:
        manifest: the bundle's.
        in_table: the bundle's table has the number of steps.
        kept: the conditioner stays loaded.
    """
    if in_table:
        return "table"
    # Within a CUDA graph nothing casts between engines, so both must have the same dtype.
    same = dtype_of(manifest, "conditioner", "modulation") == dtype_of(manifest, "backbone", "modulation")
    return "conditioner" if kept and same else "given"


class PlanArrays:
    """Three allocations on the device, each with named regions; `buffers.Buffers` says what they are for."""

    def __init__(self, manifest: Manifest, key: PlanKey, steps_at_once: int) -> None:
        """Args: as for `Buffers`."""
        self._manifest, self._key = manifest, key
        size = key.size
        #: Part -> shapes of its inputs, for each part that this plan runs.
        self.inputs: dict[str, Shapes] = {"backbone": self._with_slots("backbone", backbone_inputs(manifest, size))}
        if key.modulation == "conditioner":
            shapes = conditioner_inputs(manifest, size.batch, steps_at_once)
            self.inputs["conditioner"] = self._with_slots("conditioner", shapes)
        if key.pixels:
            self.inputs["vae_decoder"] = decoder_inputs(manifest, size)
        #: Shapes of the backbone's inputs for the negative prompts; None without guidance.
        self.negative: Shapes | None = None
        if key.negative_tokens:
            shapes = backbone_inputs(manifest, replace(size, text_tokens=key.negative_tokens))
            self.negative = self._with_slots("backbone", shapes)
        #: First step of every run of the conditioner. All runs have the same length, so that one context serves them
        #: all; the last two overlap if the length does not divide S.
        self.starts = conditioner_starts(size.steps, steps_at_once)
        self.staged, self.constant = Layout.of(self._staged_arrays()), Layout.of(self._constant_arrays())
        self.working = Layout.of(self._working_arrays())

    def _with_slots(self, part: str, shapes: Shapes) -> Shapes:
        """The shapes of a part's inputs, with those of its LoRA slots."""
        slots = self._manifest.parts[part].lora
        if slots is None:
            return shapes
        return {**shapes, **{name: shape for name, (shape, _) in slots.shapes({}, self._key.lora_rank).items()}}

    @property
    def nbytes(self) -> int:
        """Size of the three allocations in bytes."""
        return self.staged.nbytes + self.constant.nbytes + self.working.nbytes

    def _modulations(self, rows: int) -> tuple[tuple[int, ...], StoredDType]:
        """Shape and dtype of the modulation of all steps: [S, rows, M] in the dtype of the backbone's input."""
        width = self.inputs["backbone"]["modulation"][1]
        return (self._key.size.steps, rows, width), dtype_of(self._manifest, "backbone", "modulation")

    def _staged_arrays(self) -> ArraySpecs:
        inputs, conditioner = self.inputs["backbone"], self.inputs.get("conditioner", {})
        arrays: ArraySpecs = {"streams": ((self._key.size.batch, 2), "int64")}
        arrays["states"] = (
            inputs["encoder_hidden_states"],
            dtype_of(self._manifest, "backbone", "encoder_hidden_states"),
        )
        if self.negative is not None:
            arrays["negative_states"] = (self.negative["encoder_hidden_states"], arrays["states"][1])
            arrays["scale"] = ((1,), "float32")
        if self._key.modulation == "given":
            arrays["modulations"] = self._modulations(self._key.size.batch)
        for short, name in (("pooled", "pooled_projections"), ("guidance", "guidance")):
            if name in conditioner:
                arrays[short] = (conditioner[name], dtype_of(self._manifest, "conditioner", name))
        return arrays

    def _constant_arrays(self) -> ArraySpecs:
        inputs = self.inputs["backbone"]
        arrays: ArraySpecs = {
            n: (inputs[n], dtype_of(self._manifest, "backbone", n)) for n in ("image_rotary", "text_rotary")
        }
        if self.negative is not None:
            arrays["negative_rotary"] = (self.negative["text_rotary"], arrays["text_rotary"][1])
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
        if (dtype := dtype_of(self._manifest, "backbone", "latents")) != "float32":
            arrays["input"] = (inputs["backbone"]["latents"], dtype)
        arrays |= {name: (shape, dtype_of(self._manifest, "backbone", name)) for name, shape in heads.items()}
        if self.negative is not None:
            arrays["negative_velocity"] = arrays["velocity"]
        arrays["modulation"] = (inputs["backbone"]["modulation"], dtype_of(self._manifest, "backbone", "modulation"))
        if self._key.modulation == "conditioner":
            made = output_shapes(self._manifest, "conditioner", inputs["conditioner"])["modulation"]
            arrays["conditioned"] = (made, dtype_of(self._manifest, "conditioner", "modulation"))
            arrays["modulations"] = self._modulations(made[1])
        if self._key.pixels:
            images = output_shapes(self._manifest, "vae_decoder", inputs["vae_decoder"])["images"]
            arrays["images"] = (images, "uint8")
        return arrays


def host_arrays(manifest: Manifest, part: str, inputs: Shapes) -> tuple[Layout, Layout]:
    """The arrays of a part that runs on host arrays: of its inputs, and of its outputs."""
    spec, outputs = manifest.parts[part], output_shapes(manifest, part, inputs)
    dtypes = {s.name: s.dtype for s in spec.inputs} | spec.slot_dtypes
    return (
        Layout.of({name: (inputs[name], dtype) for name, dtype in dtypes.items()}),
        Layout.of({s.name: (outputs[s.name], s.dtype) for s in spec.outputs}),
    )


def conditioner_starts(steps: int, at_once: int) -> list[int]:
    """The first step of every run of the conditioner, when a run takes `at_once` of the steps."""
    return [*range(0, steps - at_once, at_once), steps - at_once]


def dtype_of(manifest: Manifest, part: str, name: str) -> DType:
    """The dtype of the input or output `name` of a part."""
    spec = manifest.parts[part]
    return next(s.dtype for s in spec.inputs + spec.outputs if s.name == name)
