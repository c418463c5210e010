"""Read and write `scales.json`, the activation ranges of a student's linears, as frozen dataclasses.

`arcflow calibrate` writes the file; `arcflow quantize` and `arcflow export --scales` read it. This module imports
neither torch nor modelopt. The format is specified in `docs/calibration.md`; rule numbers (`S1`...) below cite it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arcflow_export.errors import CalibrationError
from arcflow_runtime.disk.files import whole_file
from arcflow_runtime.disk.manifest import Family, Manifest, Source, seal
from arcflow_runtime.disk.sealed import read_sealed

FORMAT = "arcflow-scales"
VERSION = 1
MAX_BYTES = 16 << 20
#: The only part that runs at every step, so its ranges are recorded per step. The others run once per prompt.
STEPPED = "backbone"

Method = Literal["max", "percentile", "mse"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PromptSet:
    """The calibration prompts: preset or file name, SHA-256 of the prompts (a newline after each), and their count."""

    name: str
    sha256: str
    count: int


@dataclass(frozen=True)
class ActivationRange:
    """The measured ranges of one linear's input and output.

    `amax` is the range of |input| by the file's method. `output_amax` is the largest |output|, bias and LoRA included.
    Both hold one value per step for the backbone and one value for a text encoder. `samples` counts the input vectors
    seen at each step.
    """

    amax: tuple[float, ...]
    samples: int
    output_amax: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Scales:
    """The contents of `scales.json`; `sizes` are (height, width) in pixels.

    `adapter` is None for a straight student. `negative_prompts` and `true_cfg_scale` are set if it was guided by them.
    """

    base: Source
    adapter: Source | None
    loras: tuple[Source, ...]
    family: Family
    method: Method
    percentile: float | None
    prompts: PromptSet
    num_inference_steps: int
    sizes: tuple[tuple[int, ...], ...]
    guidance_scale: float | None
    seed: int
    tools: Mapping[str, str]
    parts: Mapping[str, Mapping[str, ActivationRange]]
    dtype: DType = "float32"
    max_sequence_length: int | None = None
    shift: float | None = None
    timestep_ratio: float | None = None
    negative_prompts: tuple[str, ...] | None = None
    true_cfg_scale: float | None = None
    format: str = FORMAT
    version: int = VERSION

    @staticmethod
    def load(path: str | Path) -> Scales:
        """Read and check a scales file.

        Raises:
            CalibrationError: the file does not exist, is not a scales file, has another version, was edited, or breaks
                a rule; the message names the key.
        """
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"{path} is not a file; make one with `arcflow calibrate`")
        scales: Scales = read_sealed(
            Scales, path, "a scales file", "calibrate again", "update arcflow", CalibrationError, MAX_BYTES
        )
        scales.check(str(path))
        return scales

    def save(self, path: str | Path) -> None:
        """Write the file atomically.

        Raises:
            CalibrationError: a value breaks a rule; nothing is written.
        """
        path = Path(path)
        self.check(str(path))
        data = self._data()
        with whole_file(path) as partial:
            partial.write_text(_one_line_per_layer(json.dumps(data | {"digest": seal(data)}, indent=1)) + "\n", "utf-8")

    @property
    def digest(self) -> str:
        """SHA-256 of everything else in the file; the file ends with it, so that an edit is noticed."""
        return seal(self._data())

    def amax(self, part: str, layer: str) -> float:
        """The largest `amax` over all steps: one range that holds at every step.

        Raises:
            CalibrationError: the part or the layer was not calibrated.
        """
        if part not in self.parts:
            raise CalibrationError(
                f"scales: {part} was not calibrated, only {', '.join(self.parts)}; calibrate with --parts {part}"
            )
        if layer not in self.parts[part]:
            raise CalibrationError(f"scales: {part} has no layer {layer!r}; were they made from another student?")
        return max(self.parts[part][layer].amax)

    def check_belongs(self, manifest: Manifest) -> None:
        """Check that the bundle and these scales come from the same student (S5).

        Raises:
            CalibrationError: they do not; the message names which of base, adapter and LoRAs differ.
        """
        p = manifest.provenance
        self.check_student(manifest.family, (p.base, p.adapter, p.loras))

    def check_student(self, family: str, sources: tuple[Source, Source | None, tuple[Source, ...]]) -> None:
        """Check that these scales belong to a student.

        Args:
            family: the student's family.
            sources: its base, adapter and LoRAs; their digests are compared.

        Raises:
            CalibrationError: they do not; the message names which of base, adapter and LoRAs differ.
        """
        if self.family != family:
            raise CalibrationError(f"scales: they belong to a {self.family} student, the bundle is {family}")
        base, adapter, loras = sources
        wrong = [
            f"{key} {_name(mine)}, the bundle {_name(other)}"
            for key, mine, other in (("base", self.base, base), ("adapter", self.adapter, adapter))
            if (mine and mine.sha256) != (other and other.sha256)
        ]
        if _loras(self.loras) != _loras(loras):
            wrong.append(f"LoRAs {_names(self.loras)}, the bundle {_names(loras)}")
        if wrong:
            raise CalibrationError(
                f"scales: they belong to another student. They were made with {'; with '.join(wrong)}. "
                "Calibrate the bundle's own base, adapter and LoRAs"
            )

    def warnings(self, manifest: Manifest) -> tuple[str, ...]:
        """Warnings, one sentence each, about settings that differ between calibration and a bundle.

        Other text lengths and noise levels give other ranges. A setting that an older scales file lacks is not
        compared.
        """
        s = manifest.schedule
        pairs = (
            ("max_sequence_length", self.max_sequence_length, manifest.text.max_sequence_length),
            ("shift", self.shift, s.shift),
            ("timestep_ratio", self.timestep_ratio, s.timestep_ratio),
            ("num_inference_steps", self.num_inference_steps, s.num_inference_steps),
        )
        unguided = (
            "the scales were made without a negative prompt, and the bundle is guided by one; calibrate without "
            "--true-cfg-scale 1, or the ranges may not fit"
        )
        guided = manifest.true_cfg_scale is not None and manifest.true_cfg_scale > 1
        return ((unguided,) if guided and self.negative_prompts is None else ()) + tuple(
            f"the scales were made with {key} {mine:g}, the bundle has {theirs:g}; "
            f"calibrate with --{key.replace('_', '-')} {theirs:g}, or the ranges may not fit"
            for key, mine, theirs in pairs
            if mine is not None and mine != theirs
        )

    def check(self, where: str) -> None:
        """Check the rules that types do not cover (S4); `where` is the file's name, for messages.

        Raises:
            CalibrationError: a rule is broken; the message names the key, what it must be and what it is.
        """
        for ok, key, must, got in self._rules():
            if not ok:
                raise CalibrationError(f"{where}: {key} must be {must}, got {got!r}; calibrate again")

    def _rules(self) -> Iterator[tuple[bool, str, str, object]]:
        p = self.percentile
        if self.method == "percentile":
            yield p is not None and 0 < p <= 100, "percentile", "above 0 and at most 100", p
        else:
            yield p is None, "percentile", f"null for method {self.method}", p
        yield self.num_inference_steps >= 1, "num_inference_steps", "at least 1", self.num_inference_steps
        yield self.prompts.count >= 1, "prompts: count", "at least 1", self.prompts.count
        pairs = bool(self.sizes) and all(len(s) == 2 and min(s) > 0 and not any(v % 16 for v in s) for s in self.sizes)
        yield pairs, "sizes", "pairs of multiples of 16", [list(s) for s in self.sizes]
        g = self.guidance_scale
        yield g is None or math.isfinite(g), "guidance_scale", "finite", g
        yield self.shift is None or 0 < self.shift < math.inf, "shift", "positive and finite", self.shift
        texts, scale = self.negative_prompts, self.true_cfg_scale
        yield texts is None or bool(texts), "negative_prompts", "at least one, or null", []
        fits = scale is None if texts is None else scale is not None and 1 < scale < math.inf
        must = "null without negative_prompts" if texts is None else "above 1 and finite"
        yield fits, "true_cfg_scale", must, scale
        ratio = self.timestep_ratio
        yield ratio is None or 0 < ratio <= 1, "timestep_ratio", "above 0 and at most 1", ratio
        yield bool(self.parts), "parts", "at least one", {}
        for part, layers in self.parts.items():
            yield bool(layers), f"parts.{part}", "at least one layer", {}
            steps = self.num_inference_steps if part == STEPPED else 1
            for layer, r in layers.items():
                key = f"parts.{part}.{layer}"
                count = f"{steps} values, one per step" if part == STEPPED else "one value"
                yield len(r.amax) == steps, f"{key}: amax", count, list(r.amax)
                yield all(0 < a < math.inf for a in r.amax), f"{key}: amax", "positive and finite", list(r.amax)
                yield r.samples >= 1, f"{key}: samples", "at least 1", r.samples
                if r.output_amax is not None:
                    out = list(r.output_amax)
                    yield len(out) == steps, f"{key}: output_amax", count, out
                    yield all(0 <= a < math.inf for a in out), f"{key}: output_amax", "finite, 0 or more", out

    def _data(self) -> dict[str, object]:
        data = json.loads(json.dumps(dataclasses.asdict(self)))
        if self.negative_prompts is None:
            # Files of other students are as before these keys.
            del data["negative_prompts"], data["true_cfg_scale"]
        return {"format": data.pop("format"), "version": data.pop("version")} | data


def _one_line_per_layer(text: str) -> str:
    return re.sub(r'\{\s+"amax"[^{}]*\}', lambda match: " ".join(match[0].split()), text)


def _loras(loras: tuple[Source, ...]) -> list[tuple[str, float | None]]:
    return sorted(((s.sha256, s.scale) for s in loras), key=repr)


def _names(loras: tuple[Source, ...]) -> str:
    return ", ".join(_name(s) for s in loras) or "none"


def _name(source: Source | None) -> str:
    if source is None:
        return "none"
    scale = "" if source.scale is None else f" x {source.scale:g}"
    return f"{source.name!r}{scale} (sha256 {source.sha256[:12]})"
