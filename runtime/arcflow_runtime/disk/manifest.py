"""What `manifest.json` says: frozen dataclasses, one per object of the format.

The format is specified in `docs/bundle.md`; rule numbers (`B1`...) cite it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from arcflow_runtime.disk.families import Family

FORMAT = "arcflow-bundle"
VERSION = 1
MANIFEST = "manifest.json"
#: Folder of the engines built from the bundle, outside the sealed manifest.
ENGINES = "engines"
#: Folder of the tokenizers built from the bundle's, likewise.
OPENVINO = "openvino"

DType = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
QuantFormat = Literal["fp8_e4m3"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. A dimension is an int, or the name of a dynamic dimension."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Quantization:
    """Which linears of a part are in FP8 (B12), by name; SHA-256 of the policy that chose them and of the scales."""

    format: QuantFormat
    layers: tuple[str, ...]
    policy: str
    scales: str


@dataclass(frozen=True)
class Part:
    """One graph with its weights.

    `precision` is the dtype of its arithmetic but for the linears that `quantization` names, and of what goes in and
    out.
    """

    graph: str
    weights: str
    precision: DType
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Schedule:
    """`shift` S and `timestep_ratio` r of sigma(t) = S t / (1 + (S-1) t), t_i = 1 - i / (NFE - 1 + r)."""

    shift: float
    timestep_ratio: float
    num_inference_steps: int


@dataclass(frozen=True)
class Latents:
    """The latent space and the student's heads: K modes over `channels` x `patch_size`^2 packed channels."""

    channels: int
    patch_size: int
    vae_scale_factor: int
    num_gaussians: int
    logweights_channels: int


@dataclass(frozen=True)
class Rotary:
    """Rotary position tables: per-axis sizes of the head dimension (time, height, width)."""

    theta: float
    axes_dims: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """How prompts become token ids.

    `template` holds one `{}` for the prompt (Qwen), `drop_tokens` leading states are dropped after encoding;
    `max_sequence_length` is the default and the largest length of the text states. FLUX pads CLIP's ids to
    `clip_tokens` and T5's to the requested length with the two pad ids.
    """

    max_sequence_length: int
    template: str | None = None
    drop_tokens: int = 0
    clip_tokens: int | None = None
    clip_pad_token_id: int | None = None
    t5_pad_token_id: int | None = None


@dataclass(frozen=True)
class Range:
    """An inclusive range of a request's size."""

    min: int
    max: int


@dataclass(frozen=True)
class Ranges:
    """What sizes the graphs were exported for."""

    batch: Range
    height_px: Range
    width_px: Range


@dataclass(frozen=True)
class ModulationTable:
    """Modulation baked for a schedule: tensor `num_inference_steps_<n>` [n, M] float32 per step count."""

    file: str
    num_inference_steps: tuple[int, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where weights came from: a directory's name or a hub id, and a digest of its tensor index."""

    name: str
    revision: str | None
    sha256: str
    scale: float | None = None


@dataclass(frozen=True)
class Provenance:
    """How the bundle was made; informative only, never used to load it."""

    command: str
    created: str
    tools: Mapping[str, str]
    base: Source
    adapter: Source
    loras: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`."""

    family: Family
    dtype: DType
    reference_dtype: DType
    opset: int
    guidance: bool
    schedule: Schedule
    latents: Latents
    rotary: Rotary
    text: Text
    ranges: Ranges
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, str]
    files: Mapping[str, FileEntry]
    provenance: Provenance
    modulation: ModulationTable | None = None
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The manifest as JSON text, format and version first, sealed with its digest."""
        data = dataclasses.asdict(self)
        data = {"format": data.pop("format"), "version": data.pop("version")} | data
        return json.dumps(data | {"digest": seal(data)}, indent=2) + "\n"


def seal(data: Mapping[str, object]) -> str:
    """SHA-256 of a decoded manifest without its `digest`, in canonical JSON (B3)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
