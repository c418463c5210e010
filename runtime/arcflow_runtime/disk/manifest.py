"""The contents of a bundle's `manifest.json` as frozen dataclasses, one per JSON object.

The format is specified in `docs/bundle.md`; the rule numbers (`B1`...) refer to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from arcflow_runtime.disk.families import Family

FORMAT = "arcflow-bundle"
#: The version of a bundle with nothing new, of one with LoRA slots (B14), of one with other formats than FP8 (B15), and
#: of a straight student (B16). Each may have what the versions before it have.
PLAIN_VERSION, LORA_VERSION, FORMATS_VERSION, STRAIGHT_VERSION = VERSIONS = (1, 2, 3, 4)
MANIFEST = "manifest.json"
#: Key of the modulation table in a manifest; its slots are listed under this name beside those of the parts.
MODULATION = "modulation"
#: Folder of built engines; its files are not listed in the manifest.
ENGINES = "engines"
#: Folder of tokenizers built for OpenVINO; its files are not listed in the manifest.
OPENVINO = "openvino"

#: A slot takes LoRAs whose rank is a multiple of this (B14).
RANK_MULTIPLE = 8
#: The largest rank that a slot can be made for.
MAX_RANK = 1024

DType = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
QuantFormat = Literal["fp8_e4m3", "int8", "nvfp4"]
#: How a step is computed from the backbone's outputs: a sum of exponentials, or one velocity (B16).
Sampler = Literal["momentum", "linear"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. A dimension is an int if static, or a name if dynamic."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Quantization:
    """The quantised linears of a part (B12), by name.

    `policy` and `scales` are the SHA-256 of the policy that chose the layers and of the scales file; `scales` is None
    if no format needs calibration. `formats` has the format of layers that are not in `format`, or is None (B15).
    """

    format: QuantFormat
    layers: tuple[str, ...]
    policy: str
    scales: str | None
    formats: Mapping[str, QuantFormat] | None = None

    def format_of(self, layer: str) -> QuantFormat:
        """The format of one of `layers`."""
        return (self.formats or {}).get(layer, self.format)

    @property
    def plain(self) -> bool:
        """True if versions 1 and 2 can state it."""
        return self.format == "fp8_e4m3" and self.formats is None and self.scales is not None


@dataclass(frozen=True)
class SlotLayer:
    """A linear with a slot: its sizes, and the dtype of the slot's two inputs."""

    in_features: int
    out_features: int
    dtype: DType


@dataclass(frozen=True)
class LoraSlots:
    """The linears of a part that take the factors of a LoRA as inputs (B14), by name.

    `unread` names linears of the checkpoint that the part leaves out because nothing reads their output: a LoRA changes
    nothing there.
    """

    layers: Mapping[str, SlotLayer]
    rank_multiple: int
    max_rank: int
    unread: tuple[str, ...] = ()

    def shapes(self, ranks: Mapping[str, int], default: int = 0) -> dict[str, tuple[tuple[int, ...], DType]]:
        """The shape and dtype of every input, by name.

        Args:
            ranks: layer -> its rank, a multiple of `rank_multiple`.
            default: the rank of the other layers.
        """
        found: dict[str, tuple[tuple[int, ...], DType]] = {}
        for name, layer in self.layers.items():
            groups = ranks.get(name, default) // self.rank_multiple
            found[lora_a(name)] = ((layer.in_features, groups, self.rank_multiple), layer.dtype)
            found[lora_b(name)] = ((groups, self.rank_multiple, layer.out_features), layer.dtype)
        return found


def lora_a(layer: str) -> str:
    """The input for a layer's first factor, [in, rank / 8, 8] (B14)."""
    return f"{layer}.lora_a"


def lora_b(layer: str) -> str:
    """The input for a layer's second factor, [rank / 8, 8, out] (B14)."""
    return f"{layer}.lora_b"


@dataclass(frozen=True)
class Part:
    """One ONNX graph of the bundle with its weights, such as the backbone.

    `precision` is the dtype of its floating-point inputs, outputs and arithmetic; the linears that `quantization` lists
    are quantised. `inputs` are those of B9; the slots of `lora` are inputs as well.
    """

    graph: str
    weights: str
    precision: DType
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: Quantization | None = None
    lora: LoraSlots | None = None

    @property
    def slot_dtypes(self) -> dict[str, DType]:
        """The dtype of every input of the LoRA slots, by name; empty without slots."""
        return {} if self.lora is None else {name: dtype for name, (_, dtype) in self.lora.shapes({}).items()}


@dataclass(frozen=True)
class DynamicShift:
    """A shift that depends on the number N of image tokens (B16), as in diffusers' FlowMatchEulerDiscreteScheduler.

    mu is the line through (`base_image_tokens`, `base_shift`) and (`max_image_tokens`, `max_shift`), also outside of
    them. The shift S is exp(mu) if `kind` is "exponential", and mu if it is "linear".
    """

    kind: Literal["exponential", "linear"]
    base_shift: float
    max_shift: float
    base_image_tokens: int
    max_image_tokens: int

    def mu(self, image_tokens: int) -> float:
        """The shift's mu for images of N tokens (B16)."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_tokens - self.base_image_tokens)
        return self.base_shift + slope * (image_tokens - self.base_image_tokens)


@dataclass(frozen=True)
class Schedule:
    """The noise schedule, and the default number of steps.

    sigma(t) = S t / (1 + (S-1) t) with S = `shift`, and t_i = 1 - i / (steps - 1 + r) with r = `timestep_ratio`.

    A straight student may have more (B16): `dynamic_shift` takes the place of S, which is then 1; `sigmas` take the
    place of t_i; and with `terminal`, the sigmas are stretched so that the last one above 0 has this value.
    """

    shift: float
    timestep_ratio: float
    num_inference_steps: int
    dynamic_shift: DynamicShift | None = None
    terminal: float | None = None
    sigmas: tuple[float, ...] | None = None

    def describe(self) -> str:
        """The schedule in a few words, for the terminal."""
        d, words = self.dynamic_shift, [f"{self.num_inference_steps} steps"]
        if self.sigmas is not None:
            words.append("its own sigmas")
        if d is None:
            words.append(f"shift {self.shift:g}")
        else:
            name = f"{d.kind} shift" if d.kind == "linear" else "dynamic shift"
            tokens = f"{d.base_image_tokens} to {d.max_image_tokens} image tokens"
            words.append(f"{name} {d.base_shift:g} to {d.max_shift:g} at {tokens}")
        if self.timestep_ratio != 1 or (d is None and self.terminal is None and self.sigmas is None):
            words.append(f"timestep ratio {self.timestep_ratio:g}")
        if self.terminal is not None:
            words.append(f"last sigma {self.terminal:g}")
        return ", ".join(words)


@dataclass(frozen=True)
class Latents:
    """The latent space and the sizes of the student's heads.

    A token packs `patch_size` x `patch_size` latent pixels of `channels` channels. K is `num_gaussians`, the number of
    modes; P is `logweights_channels`, the number of sub-pixels per token.
    """

    channels: int
    patch_size: int
    vae_scale_factor: int
    num_gaussians: int
    logweights_channels: int


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: its base `theta`, and the head dimension's size per axis (time, height, width)."""

    theta: float
    axes_dims: tuple[int, ...]


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt becomes token ids; the object `text` of the manifest.

    `max_sequence_length` is the default and the largest number of text states. Qwen-Image: `template` has one `{}` for
    the prompt, and the first `drop_tokens` states are dropped after encoding. FLUX: CLIP's ids are padded to
    `clip_tokens` and T5's to the requested length, with the two pad ids.
    """

    max_sequence_length: int
    template: str | None = None
    drop_tokens: int = 0
    clip_tokens: int | None = None
    clip_pad_token_id: int | None = None
    t5_pad_token_id: int | None = None


@dataclass(frozen=True)
class SizeRange:
    """An inclusive range of a batch size or of an image side in pixels."""

    min: int
    max: int


@dataclass(frozen=True)
class Ranges:
    """The batch and image sizes that the graphs were exported for."""

    batch: SizeRange
    height_px: SizeRange
    width_px: SizeRange


@dataclass(frozen=True)
class ModulationTable:
    """Modulation computed at export: for each step count n, the tensor `num_inference_steps_<n>` [n, M] float32.

    With slots, `lora`, the file also has the linears' input `conditioning_<n>` [n, D], and `columns` has the first of
    the columns of M that each layer gives.
    """

    file: str
    num_inference_steps: tuple[int, ...]
    lora: LoraSlots | None = None
    columns: Mapping[str, int] | None = None


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where weights came from: a directory's name or a hub id, and a digest of its list of tensors."""

    name: str
    revision: str | None
    sha256: str
    scale: float | None = None


@dataclass(frozen=True)
class Provenance:
    """How the bundle was made, for information only; nothing is loaded by it.

    `vae` is the VAE that was given in place of the base's, or None.
    """

    command: str
    created: str
    tools: Mapping[str, str]
    base: Source
    adapter: Source | None
    loras: tuple[Source, ...] = ()
    vae: Source | None = None


@dataclass(frozen=True)
class Manifest:
    """The whole `manifest.json`.

    `true_cfg_scale` is the default scale of guidance with a negative prompt, or None for a student without it (B16).
    """

    family: Family
    dtype: DType
    reference_dtype: DType
    opset: int
    guidance: bool
    schedule: Schedule
    latents: Latents
    rotary: Rotary
    text: PromptFormat
    ranges: Ranges
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, str]
    files: Mapping[str, FileEntry]
    provenance: Provenance
    modulation: ModulationTable | None = None
    sampler: Sampler = "momentum"
    true_cfg_scale: float | None = None
    format: str = FORMAT
    version: int = PLAIN_VERSION

    @property
    def rotary_dtype(self) -> DType:
        """The dtype that FLUX's rotary tables are rounded to: a straight student's reference does not round them."""
        return "float32" if self.sampler == "linear" else self.reference_dtype

    def slots(self) -> dict[str, LoraSlots]:
        """The LoRA slots by part; those of the modulation table are under `MODULATION`."""
        table = None if self.modulation is None else self.modulation.lora
        found = {name: part.lora for name, part in self.parts.items()} | {MODULATION: table}
        return {name: slots for name, slots in found.items() if slots is not None}

    @property
    def needed_version(self) -> int:
        """The version that the contents need: the oldest one whose readers can read them."""
        if self.sampler == "linear":
            return STRAIGHT_VERSION
        if any(part.quantization is not None and not part.quantization.plain for part in self.parts.values()):
            return FORMATS_VERSION
        return LORA_VERSION if self.slots() else PLAIN_VERSION

    def to_json(self) -> str:
        """The manifest as JSON text with `format` and `version` first and its digest last (B3)."""
        data = dataclasses.asdict(self)
        if self.provenance.vae is None:
            del data["provenance"]["vae"]
        for place, keys, _ in later_keys(data, self.version):
            for key in keys:
                del place[key]
        data = {"format": data.pop("format"), "version": data.pop("version")} | data
        return json.dumps(data | {"digest": seal(data)}, indent=2) + "\n"


def later_keys(data: dict[str, Any], version: int) -> list[tuple[dict[str, Any], list[str], str]]:
    """The objects of a decoded manifest that have keys of versions after `version`, each with these keys and a rule."""
    found: list[tuple[dict[str, Any], list[str], str]] = []
    if version < LORA_VERSION:
        found += [(part, ["lora"], "B14") for part in data["parts"].values()]
        if data["modulation"] is not None:
            found.append((data["modulation"], ["lora", "columns"], "B14"))
    if version < FORMATS_VERSION:
        quantized = (part.get("quantization") for part in data["parts"].values())
        found += [(q, ["formats"], "B15") for q in quantized if q is not None]
    if version < STRAIGHT_VERSION:
        found.append((data, ["sampler", "true_cfg_scale"], "B16"))
        found.append((data["schedule"], ["dynamic_shift", "terminal", "sigmas"], "B16"))
    return found


def seal(data: Mapping[str, object]) -> str:
    """The digest that seals a manifest or record: SHA-256 of `data`, without `digest`, as canonical JSON (B3)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
