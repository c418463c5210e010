"""Compare a bundle with its reference: two bundles and cases -> the report, and images for its contact sheet.

This is the drift gate's entry, called by `arcflow verify --against`. The cases are compared in groups that fit in a
fixed amount of memory; `compare_cases.py` compares one group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from arcflow_export.drift import gate
from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.drift.comparable import check_comparable
from arcflow_export.drift.compare_cases import CaseErrors, EndToEnd, compare_cases
from arcflow_export.drift.graphs import quantized_layers
from arcflow_export.drift.judged import Judged, check_judge, judge_images
from arcflow_export.drift.layers import LayerDrift, drift_of_layers
from arcflow_export.drift.measures import mean
from arcflow_export.drift.report import GROUPS, DriftReport, Measure, shown_places
from arcflow_export.drift.sensitivity import PROMPTS, Kind, Sensitivity, measure_sensitivity
from arcflow_export.drift.stages import BundleStages
from arcflow_export.emulate.blocks import BlockEngine
from arcflow_export.emulate.emulate import load_graph
from arcflow_export.errors import ExportError
from arcflow_export.formats.thresholds import Thresholds
from arcflow_export.images.statistics import Interval
from arcflow_export.progress import StageProgress
from arcflow_runtime.disk.bundle import Bundle

#: Memory for the data of the cases that are compared together: heads, text states, and values between pieces.
KEPT_BYTES = 1 << 30
_PACKAGES = ("arcflow", "onnxruntime", "onnx", "onnx-ir", "numpy")


@dataclass(frozen=True)
class ShownImages:
    """Both bundles' images for some of the prompts, for the contact sheet: [n, H, W, 3] uint8."""

    prompts: tuple[str, ...]
    reference: np.ndarray
    candidate: np.ndarray


@dataclass(frozen=True)
class DriftPlan:
    """Names of the prompts and the policy, the policy's limits, and which optional measurements to make.

    `engines` generates the candidate's images end to end, and `backend` is the name of the backend that runs them. If
    both are None, the candidate's graphs generate them.
    """

    prompts: str
    policy: str
    limits: Thresholds
    judge: Path | None = None
    sensitivity: Kind = "none"
    engines: EndToEnd | None = None
    backend: str | None = None


def compare(
    candidate: Bundle,
    reference: Bundle,
    cases: Sequence[DriftCase],
    scene: ImageSettings,
    plan: DriftPlan,
    progress: StageProgress = lambda stage, done, total: None,
) -> tuple[DriftReport, ShownImages]:
    """Measure the drift of `candidate` from `reference` and compare it with the thresholds.

    Memory: the float32 weights of one part (or one piece of a large part), its activations, and `KEPT_BYTES`.

    Args:
        candidate: the bundle to check.
        reference: an unquantised bundle of the same student.
        cases: prompts and seeds to generate.
        scene: image size, steps, guidance and text length; both bundles must accept them.
        plan: what to measure, and the limits.
        progress: receives each stage's name, the work done and its total.

    Raises:
        ExportError: the bundles are of different students, or the reference is quantised.
        RequestError: the judge cannot read these images.
        ArcFlowError: a part cannot be run.
    """
    notes = check_comparable(candidate, reference)
    quantized = {part: quantized_layers(load_graph(candidate, part)) for part in candidate.manifest.parts}
    for part in reference.manifest.parts:
        if names := quantized_layers(load_graph(reference, part)):
            raise ExportError(
                f"{reference.root}: a reference must not be quantised, but layer {names[0]} of {part} is; "
                "give the bundle that it was made from"
            )
    if plan.judge is not None:
        check_judge(cases, scene)
    parts = [part for part, names in quantized.items() if names]
    together = max(KEPT_BYTES // _case_bytes(reference, scene), 1)
    found: CaseErrors | None = None
    for start in range(0, len(cases), together):
        some = cases[start : start + together]
        named = partial(_named, progress, start, len(some), len(cases))
        more = compare_cases(candidate, reference, some, scene, parts, plan.engines, named)
        wanted = [i - start for i in _wanted(cases, plan) if start <= i < start + len(some)]
        more.reference, more.candidate = more.reference[wanted], more.candidate[wanted]
        found = more if found is None else _joined(found, more)
    assert found is not None

    measures = [Measure(q.group, q.what, q.unit, mean(values), q.step) for q, values in found.values.items()]
    layers = [d for part in parts for d in drift_of_layers(candidate, part, found.layers[part])]
    judged = None
    places = shown_places(len(cases))
    if plan.judge is not None:
        judged = judge_images(plan.judge, cases, found.reference, found.candidate)
        found.reference, found.candidate = found.reference[places], found.candidate[places]
    shown = ShownImages(tuple(cases[i].prompt for i in places), found.reference, found.candidate)
    sensitivity = _sensitivity(reference, candidate, cases, scene, layers, plan, progress)
    report = DriftReport(
        settings=_settings(candidate, reference, cases, scene, plan),
        versions={package: version(package) for package in _PACKAGES},
        notes=notes,
        thresholds=plan.limits,
        measures=tuple(sorted(measures, key=lambda m: GROUPS.index(m.group))),
        judged=judged,
        layers=tuple(layers),
        sensitivity=sensitivity,
        breaches=_breaches(measures, layers, judged, plan.limits),
    )
    return report, shown


def kept_bytes(reference: Bundle, scene: ImageSettings, cases: int) -> int:
    """About how many bytes are kept for the cases that are compared together."""
    one = _case_bytes(reference, scene)
    return max(min(one * cases, KEPT_BYTES), one)


def _case_bytes(reference: Bundle, scene: ImageSettings) -> int:
    """About how many bytes are kept for one case: both bundles' heads, text states and images, and the values between
    the pieces of a large backbone, for two runs of it, or four with a negative prompt.
    """
    m, spec = reference.manifest, reference.manifest.parts["backbone"]
    k = m.latents
    side = k.patch_size * k.vae_scale_factor
    tokens = (scene.height_px // side) * (scene.width_px // side)
    channels = k.channels * k.patch_size**2
    heads = tokens * (k.num_gaussians * channels + (2 * k.num_gaussians - 1) * k.logweights_channels)
    states = next(s for s in spec.inputs if s.name == "encoder_hidden_states").shape[-1]
    text = scene.max_sequence_length * int(states)
    sizes = {"batch": 1, "image_tokens": tokens, "text_tokens": scene.max_sequence_length}
    passed = BlockEngine("backbone", load_graph(reference, "backbone")).kept_bytes(sizes)
    images = 2 * 3 * scene.height_px * scene.width_px
    texts, runs = (2, 2) if scene.negative_prompt is None else (4, 4)
    return 4 * ((scene.num_inference_steps + 2) * heads + texts * text) + runs * passed + images


def _named(progress: StageProgress, start: int, count: int, total: int, stage: str, done: int, end: int) -> None:
    """Report progress of a stage; if the cases are compared in several groups, name the group's prompts."""
    some = "" if count == total else f", prompts {start + 1} to {start + count} of {total}"
    progress(f"{stage}{some}", done, end)


def _wanted(cases: Sequence[DriftCase], plan: DriftPlan) -> list[int]:
    """The indices of the cases whose images are kept: all for the judge, else those on the contact sheet."""
    return list(range(len(cases))) if plan.judge is not None else shown_places(len(cases))


def _joined(a: CaseErrors, b: CaseErrors) -> CaseErrors:
    for part, errors in a.layers.items():
        errors.extend(b.layers[part])
    return CaseErrors(
        {q: np.concatenate([values, b.values[q]]) for q, values in a.values.items()},
        a.layers,
        np.concatenate([a.reference, b.reference]),
        np.concatenate([a.candidate, b.candidate]),
    )


def _sensitivity(
    reference: Bundle,
    candidate: Bundle,
    cases: Sequence[DriftCase],
    scene: ImageSettings,
    layers: Sequence[LayerDrift],
    plan: DriftPlan,
    progress: StageProgress,
) -> Sensitivity | None:
    """Measure the sensitivity on at most `PROMPTS` of the cases, spread evenly."""
    if plan.sensitivity == "none" or not any(d.part == "backbone" for d in layers):
        return None
    some = list(cases[:: -(-len(cases) // PROMPTS)])
    stages = BundleStages(reference, some, scene, candidate.manifest.reference_dtype)
    encoded = stages.encode()
    batches = stages.batches(encoded, stages.modulation(encoded.pooled))
    trajectory = stages.generate(batches)
    return measure_sensitivity(
        reference,
        candidate,
        stages,
        batches,
        trajectory,
        layers,
        plan.sensitivity,
        plan.limits,
        partial(progress, f"sensitivity of {plan.sensitivity}"),
    )


def _breaches(
    measures: Sequence[Measure], layers: Sequence[LayerDrift], judged: Judged | None, limits: Thresholds
) -> tuple[gate.Breach, ...]:
    by_name: dict[str, list[Interval]] = {}
    for m in measures:
        by_name.setdefault(m.what, []).append(m.interval)
    head = next(name for name in gate.MAIN_HEADS if name in by_name)
    return gate.check(
        limits,
        layers,
        by_name[head],
        by_name["latents"][-1],
        by_name["PSNR"][0],
        None if judged is None else judged.drop,
        head,
    )


def _settings(
    candidate: Bundle, reference: Bundle, cases: Sequence[DriftCase], scene: ImageSettings, plan: DriftPlan
) -> dict[str, object]:
    return {
        "candidate": candidate.root.absolute().name,
        "reference": reference.root.absolute().name,
        "precision": {
            side: {name: part.precision for name, part in bundle.manifest.parts.items()}
            for side, bundle in (("candidate", candidate), ("reference", reference))
        },
        "policy": plan.policy,
        "prompts": plan.prompts,
        "count": len(cases),
        "seed": cases[0].seed,
        "judge": plan.judge is not None,
        "backend": plan.backend,
        **dataclasses.asdict(scene),
    }
