"""The bundle on disk: `manifest.json` <-> frozen dataclasses, and the checks made before anything is loaded.

The format is specified in `docs/bundle.md`; rule numbers (`B1`...) below cite it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from .errors import BundleError
from .parse import parse, read_json
from .rules import check_values

FORMAT = "arcflow-bundle"
VERSION = 1
MANIFEST = "manifest.json"
#: Folder of the engines built from the bundle, outside the sealed manifest.
ENGINES = "engines"
#: Folder of the tokenizers built from the bundle's, likewise.
OPENVINO = "openvino"
MAX_MANIFEST_BYTES = 16 << 20
#: Files up to this size are hashed at every load; larger ones are hashed by `check="full"`.
FAST_HASH_BYTES = 64 << 20

Family = Literal["flux", "qwen-image"]
DType = Literal["float32", "float16", "bfloat16", "int64", "uint8"]
QuantFormat = Literal["fp8_e4m3"]
Check = Literal["fast", "full"]


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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its checked manifest.

    `manifest_sha256` is that of the file which was read; None for a bundle that was not read from a directory.
    """

    root: Path
    manifest: Manifest = field(repr=False)
    manifest_sha256: str | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def open(root: str | Path, check: Check = "fast", progress: Callable[[int], None] | None = None) -> Bundle:
        """Read and check the bundle in directory `root`.

        Args:
            root: the bundle's directory; made absolute, so that a later change of the working directory does no harm.
            check: "fast" compares every size and hashes files up to 64 MiB; "full" hashes every file.
            progress: called with the number of bytes hashed since the last call.

        Raises:
            BundleError: the directory is no bundle, of another version, damaged, or a path leaves it.
        """
        root = Path(root).absolute()
        manifest, digest = _read_manifest(root)
        bundle = Bundle(root, manifest, digest)
        check_values(manifest, str(root / MANIFEST))
        bundle._check_references()
        bundle._check_files(check, progress or (lambda _: None))
        return bundle

    def path(self, name: str) -> Path:
        """The path of the bundle's file `name`, which the manifest must list (B5)."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.root / MANIFEST}: {name!r} is used but not listed under 'files'")
        return self.root / name

    def check_unchanged(self) -> None:
        """Check that the directory still holds the bundle that was opened, and not one written in its place.

        Raises:
            BundleError: its manifest is another one, or gone.
        """
        if self.manifest_sha256 is None:
            return
        path = self.root / MANIFEST
        try:
            unchanged = sha256_file(path) == self.manifest_sha256
        except OSError:
            unchanged = False
        if not unchanged:
            raise BundleError(f"{self.root} was replaced or removed since it was opened; load it again")

    def _check_references(self) -> None:
        m = self.manifest
        where = self.root / MANIFEST
        need = {"flux": {"text_encoder", "text_encoder_2"}, "qwen-image": {"text_encoder"}}[m.family]
        need = need | {"backbone", "vae_decoder"}
        if m.modulation is None:
            need = need | {"conditioner"}
        if missing := sorted(need - m.parts.keys()):
            raise BundleError(f"{where}: a {m.family} bundle must have parts {sorted(need)}, missing {missing}")
        used = [f for p in m.parts.values() for f in (p.graph, p.weights)] + list(m.tokenizers.values())
        if m.modulation is not None:
            used.append(m.modulation.file)
        for name in used:
            self.path(name)

    def _check_files(self, check: Check, progress: Callable[[int], None]) -> None:
        for name in self.manifest.files:
            self.check_file(name, check, progress)

    def check_file(self, name: str, check: Check, progress: Callable[[int], None] | None = None) -> None:
        """Compare one file with its entry in the manifest (B4, B6); arguments as for `open`.

        Raises:
            BundleError: the file is missing, damaged, or leaves the bundle.
        """
        entry, path = self.manifest.files[name], self.root / name
        _check_name(name, self.root)
        if not path.is_file():
            raise BundleError(f"{path} is missing; was the bundle moved in part? Copy the whole directory again")
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"{path} is a link that leaves the bundle; copy the file into it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{path} must have {entry.bytes} bytes, got {size}; it was cut or edited, export or copy it again"
            )
        if (check == "full" or size <= FAST_HASH_BYTES) and sha256_file(path, progress) != entry.sha256:
            raise BundleError(
                f"{path} does not match its SHA-256 in {MANIFEST}; it was edited or damaged, export or copy it again"
            )


def timestamp() -> str:
    """Now in UTC, for `Provenance.created`; SOURCE_DATE_EPOCH in its place, so that equal runs give equal bundles.

    Raises:
        BundleError: SOURCE_DATE_EPOCH is not a whole number of seconds since 1970.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        when = datetime.now(timezone.utc) if epoch is None else datetime.fromtimestamp(int(epoch), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise BundleError(f"SOURCE_DATE_EPOCH must be seconds since 1970, got {epoch!r}") from None
    return when.isoformat(timespec="seconds")


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in 4 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(4 << 20):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def _check_name(name: str, root: Path) -> None:
    parts = name.split("/")
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", name) or any(p in ("", ".", "..") for p in parts):
        raise BundleError(f"{root / MANIFEST}: file name {name!r} leaves the bundle or has characters it may not have")
    for folder, what in ((ENGINES, "engines"), (OPENVINO, "tokenizers")):
        if parts[0] == folder:
            raise BundleError(f"{root / MANIFEST}: file {name!r} must not be in {folder}/, which is for built {what}")


def _read_manifest(root: Path) -> tuple[Manifest, str]:
    """The manifest, and the SHA-256 of its file."""
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"{root} is not a directory; give the directory that `arcflow export --out` wrote")
    if not path.is_file():
        raise BundleError(f"{root} has no {MANIFEST}, so it is not a bundle; make one with `arcflow export`")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; it is not a manifest")
    try:
        text = path.read_bytes()
        data = read_json(text)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path} is not valid JSON ({e}); export the bundle again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{path}: 'format' must be {FORMAT!r}; this is not an ArcFlow bundle")
    version = data.get("version")
    if version != VERSION:
        what = "update arcflow" if isinstance(version, int) and version > VERSION else "export the bundle again"
        raise BundleError(f"{path}: version must be {VERSION}, got {version!r}; {what}")
    digest = data.pop("digest", None)
    manifest: Manifest = parse(Manifest, data, str(path))
    if digest != seal(data):
        raise BundleError(f"{path} does not match its own digest; it was edited, export the bundle again")
    return manifest, hashlib.sha256(text).hexdigest()


def seal(data: Mapping[str, object]) -> str:
    """SHA-256 of a decoded manifest without its `digest`, in canonical JSON (B3)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
