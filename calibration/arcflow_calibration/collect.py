"""Collect the ranges of a student's linears while the torch student generates images for the calibration prompts.

The torch student runs diffusers' modules with the closed-form update between steps, so the activations are those of
real use. modelopt's quantizers on the linears' inputs only collect; nothing is quantised, so the images are unchanged.
"""

from __future__ import annotations

import contextlib
import io
import platform
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from arcflow_calibration.options import CalibrationSettings
from arcflow_calibration.ranges import Calibrator, make_calibrator
from arcflow_export.errors import CalibrationError
from arcflow_export.families import facts
from arcflow_export.formats.prompts import Prompts
from arcflow_export.formats.scales import STEPPED, ActivationRange, Scales
from arcflow_export.models.layers import linear_names
from arcflow_export.student.load import Student
from arcflow_export.student.reference import TorchStudent, pack
from arcflow_export.student.straight import guided
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE

_TOOLS = ("arcflow", "torch", "diffusers", "transformers", "nvidia-modelopt")


@dataclass
class CalibratedLayer:
    """One linear and its results, with one calibrator per step.

    `linear` is the nn.Linear, to which modelopt adds `input_quantizer`. `module` is the module that is called: the
    linear itself, or peft's wrapper, which adds the LoRA product. `name` is the name of the MatMul in the graph.
    """

    name: str
    module: nn.Module
    linear: Any
    calibrators: list[Calibrator]
    output_peaks: list[float]
    samples: list[int] = field(default_factory=list)


class Collector:
    """The quantizers on a student's linears; setting `step` selects the calibrators of that step."""

    def __init__(self, student: Student, torch_student: TorchStudent, settings: CalibrationSettings):
        """Put modelopt's quantizers on every linear of the parts to calibrate.

        Raises:
            CalibrationError: a linear of the bundle's graph is not a linear layer in the torch student.
        """
        self.parts: dict[str, dict[str, CalibratedLayer]] = {}
        for part in settings.parts:
            steps = settings.num_inference_steps if part == STEPPED else 1
            self.parts[part] = {}
            for name, module in _linears(student, torch_student, part):
                linear = getattr(module, "base_layer", module)
                if not isinstance(linear, nn.Linear):
                    raise CalibrationError(f"{part}: {name} must be a linear layer, got {type(linear).__name__}")
                calibrators = [make_calibrator(name, settings.method, settings.percentile) for _ in range(steps)]
                layer = CalibratedLayer(name, module, linear, calibrators, [0.0] * steps, [0] * steps)
                self.parts[part][name] = layer
        for part, layers in self.parts.items():
            _quantizers(part, layers)
            for layer in layers.values():
                layer.module.register_forward_hook(self._output_hook(part, layer))
        self.step = 0

    @property
    def step(self) -> int:
        """The current step, counted from 0; text encoders have only step 0."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        for part, layers in self.parts.items():
            for layer in layers.values():
                layer.linear.input_quantizer._calibrator = layer.calibrators[step if part == STEPPED else 0]

    def ranges(self) -> dict[str, dict[str, ActivationRange]]:
        """The collected ranges, by part and layer.

        Raises:
            CalibrationError: a linear got only zeros as input, or was never called.
        """
        return {
            part: {name: _range(part, layer) for name, layer in layers.items()} for part, layers in self.parts.items()
        }

    def _output_hook(self, part: str, layer: CalibratedLayer) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            step = self._step if part == STEPPED else 0
            peak = float(output.abs().amax())
            if not peak < float("inf"):
                raise CalibrationError(f"{layer.name}: its output overflows or is NaN; try --dtype float32")
            layer.output_peaks[step] = max(layer.output_peaks[step], peak)
            layer.samples[step] += output.numel() // output.shape[-1]

        return hook


def _linears(student: Student, torch_student: TorchStudent, part: str) -> Iterator[tuple[str, nn.Module]]:
    """The linears of the part's graph: the name in the graph, and the module of the torch student."""
    described = next(p for p in student.parts("float32") if p.name == part)
    if part == STEPPED:
        # A straight student's last layer is the transformer's own.
        last = torch_student.heads if student.adapter is not None else torch_student.transformer
        root: nn.Module = nn.ModuleDict({"transformer": torch_student.transformer, "heads": last})
    else:
        root = attrgetter(facts(student.family).calibrated[part])(torch_student.pipe)
    for layer, name in linear_names(described).items():
        yield layer, root.get_submodule(name)


def _quantizers(part: str, layers: dict[str, CalibratedLayer]) -> None:
    """Give each linear an input quantizer that collects and does not quantise.

    modelopt gets a ModuleDict with the linears only. So its default exclusions, and its replacements of attention and
    LoRA layers, which would change the student's numbers, do not apply.
    """
    import modelopt.torch.quantization as mtq

    linears = nn.ModuleDict({name.replace(".", "/"): layer.linear for name, layer in layers.items()})
    wanted = {f"{name}.input_quantizer" for name in linears}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *({"quantizer_name": name, "cfg": {"num_bits": (4, 3), "axis": None}} for name in sorted(wanted)),
        ],
        "algorithm": None,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many quantizers it inserted
        mtq.quantize(linears, config)
    enabled = {name for name, module in linears.named_modules() if getattr(module, "is_enabled", False)}
    assert enabled == wanted, f"{part}: modelopt quantises {sorted(enabled ^ wanted)} contrary to what it was told"
    for layer in layers.values():
        layer.linear.input_quantizer.disable_quant()
        layer.linear.input_quantizer.enable_calib()


def _range(part: str, layer: CalibratedLayer) -> ActivationRange:
    for step, calibrator in enumerate(layer.calibrators):
        if calibrator.peak == 0:
            seen = "saw only zeros" if layer.samples[step] else "was never called"
            raise CalibrationError(f"{part}: {layer.name} {seen} at step {step}; calibrate on other prompts")
    return ActivationRange(tuple(c.amax() for c in layer.calibrators), layer.samples[0], tuple(layer.output_peaks))


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that run together, as (index, text) pairs, and their image size in pixels."""

    prompts: tuple[tuple[int, str], ...]
    height: int
    width: int


def plan_batches(prompts: Prompts, settings: CalibrationSettings) -> list[PromptBatch]:
    """Split the prompts into batches of one image size each; the split is deterministic."""
    batches = []
    for s, (height, width) in enumerate(settings.sizes):
        mine = list(enumerate(prompts.texts))[s :: len(settings.sizes)]
        for start in range(0, len(mine), settings.batch):
            batches.append(PromptBatch(tuple(mine[start : start + settings.batch]), height, width))
    return batches


@torch.inference_mode()
def generate_batch(
    student: TorchStudent,
    batch: PromptBatch,
    settings: CalibrationSettings,
    guidance_scale: float | None,
    on: Collector,
) -> None:
    """Generate a batch without decoding it, while `on` collects; text encoders run once per prompt.

    With negative prompts the network runs twice in each step, and both calls count: the linears see both.
    """
    encoded = student.encode_batch([text for _, text in batch.prompts], settings.max_sequence_length)
    away = _negative_states(student, batch, settings)
    if STEPPED not in on.parts:
        return
    channels = student.transformer.config.in_channels // 4
    noise = [
        torch.randn(
            1,
            channels,
            batch.height // 8,
            batch.width // 8,
            generator=torch.Generator("cpu").manual_seed(settings.seed + index),
        )
        for index, _ in batch.prompts
    ]
    sigmas = student.schedule(settings.num_inference_steps, batch.height, batch.width)
    lengths = [(encoded[i][0].shape[1], away[i].shape[1] if away else 0) for i in range(len(encoded))]
    for group in _equal_lengths(lengths):
        states = torch.cat([encoded[i][0] for i in group])
        vectors = [pooled for i in group if (pooled := encoded[i][1]) is not None]
        pooled = torch.cat(vectors) if vectors else None
        negative = torch.cat([away[i] for i in group]) if away else None
        x = pack(torch.cat([noise[i] for i in group]).to(student.device))
        for step in range(settings.num_inference_steps):
            on.step = step
            size = (batch.height, batch.width, DEFAULT_GUIDANCE_SCALE if guidance_scale is None else guidance_scale)
            heads = student.predict(x, sigmas[step], states, pooled, *size)
            if negative is not None:
                assert settings.true_cfg_scale is not None, "negative prompts have a scale"
                against = student.predict(x, sigmas[step], negative, None, *size)
                heads = (guided(heads[0], against[0], settings.true_cfg_scale),)
            x = student.step(x, heads, float(sigmas[step]), float(sigmas[step + 1]))
    on.step = 0


def _negative_states(student: TorchStudent, batch: PromptBatch, settings: CalibrationSettings) -> list[torch.Tensor]:
    """The text states [1, T, D] of each prompt's negative prompt; empty without guidance by one."""
    given = settings.negative_prompts
    texts = [given[index % len(given)] for index, _ in batch.prompts] if given else []
    distinct = list(dict.fromkeys(texts))
    encoded = student.encode_batch(distinct, settings.max_sequence_length) if distinct else []
    states = {text: found for text, (found, _) in zip(distinct, encoded, strict=True)}
    return [states[text] for text in texts]


def _equal_lengths(lengths: Sequence[Hashable]) -> list[list[int]]:
    """Group indices by text length. Qwen-Image has no text mask, so only prompts of equal length can share a call."""
    groups: dict[Hashable, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return list(groups.values())


def guidance(student: Student, settings: CalibrationSettings) -> float | None:
    """The guidance scale for the student, or None if it takes none.

    Raises:
        CalibrationError: the settings give a guidance scale, but the student takes none.
    """
    if student.outline.guidance:
        return DEFAULT_GUIDANCE_SCALE if settings.guidance_scale is None else settings.guidance_scale
    if settings.guidance_scale is not None:
        raise CalibrationError("--guidance-scale: this student takes none; leave it out")
    return None


def describe(
    student: Student, prompts: Prompts, settings: CalibrationSettings, parts: dict[str, dict[str, ActivationRange]]
) -> Scales:
    """Put the collected ranges and their origin into a `Scales` object."""
    base, adapter, loras = student.sources
    straight = settings.straight
    return Scales(
        base=base,
        adapter=adapter,
        loras=loras,
        family=student.family,  # type: ignore[arg-type]
        method=settings.method,
        percentile=settings.percentile,
        prompts=prompts.record,
        num_inference_steps=settings.num_inference_steps,
        sizes=settings.sizes,
        guidance_scale=guidance(student, settings),
        seed=settings.seed,
        tools=tools(),
        parts=parts,
        dtype=settings.dtype,
        max_sequence_length=settings.max_sequence_length,
        shift=settings.shift if straight is None else (straight.shift if straight.dynamic_shift is None else None),
        timestep_ratio=settings.timestep_ratio if straight is None else straight.timestep_ratio,
        negative_prompts=settings.negative_prompts or None,
        true_cfg_scale=settings.true_cfg_scale,
    )


def tools() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    return {name: metadata.version(name) for name in _TOOLS} | {"python": platform.python_version()}
