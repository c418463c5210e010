"""Compare a bundle with its reference: two bundles and cases -> `Report`, and the pictures of both.

Each part is given the reference's own inputs, so that an error shows in the part that makes it; then both draw from the
same noise by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

from arcflow_distill.evaluate.statistics import Interval
from arcflow_runtime.bundle import Bundle

from ..emulate import load_graph
from ..errors import ExportError
from . import gate
from .cases import Case, Scene
from .comparable import check_comparable, same_parts
from .graphs import quantized_layers
from .judged import Judged, check_judge, judge_pictures
from .layers import LayerDrift, drift_of_layers
from .measures import gmsd, mean, psnr_db, relative_error
from .report import GROUPS, Measure, Report
from .sensitivity import PROMPTS, Kind, Sensitivity, measure_sensitivity
from .stages import HEADS, Batch, Stages, Text, Trajectory, advance, backbone_inputs, predict_all
from .thresholds import Thresholds

#: Called as the stage named goes on, with how much of it is done and its total.
Progress = Callable[[str, int, int], None]
_PACKAGES = ("arcflow", "onnxruntime", "onnx", "onnx-ir", "numpy")
_RELATIVE, _DB, _PLAIN = "relative RMS error", "dB", "0 is equal"


@dataclass(frozen=True)
class Pictures:
    """What both sides drew: prompts, and [n, H, W, 3] uint8."""

    prompts: tuple[str, ...]
    reference: np.ndarray
    candidate: np.ndarray


@dataclass(frozen=True)
class Plan:
    """Names of the prompts and the policy, its limits, and what to measure beyond the parts."""

    prompts: str
    policy: str
    limits: Thresholds
    judge: Path | None = None
    sensitivity: Kind = "none"


def compare(
    candidate: Bundle,
    reference: Bundle,
    cases: Sequence[Case],
    scene: Scene,
    plan: Plan,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Report, Pictures]:
    """Measure the drift of `candidate` from `reference` and hold it against the thresholds.

    Memory: one part at a time, in float32 where it is bfloat16, and the reference's heads and latents of all cases.
    What both bundles have in the same files is run once.

    Args:
        candidate: the bundle to check.
        reference: an unquantised bundle of the same student.
        cases: what to draw.
        scene: with what; both bundles must accept it.
        plan: what to measure and the limits.
        progress: called as the work goes on.

    Raises:
        ExportError: the bundles are of different students, or the reference is quantised.
        RequestError: the judge cannot read these pictures.
        ArcFlowError: a part cannot be run.
    """
    notes = check_comparable(candidate, reference)
    quantized = {part: quantized_layers(load_graph(candidate, part)) for part in candidate.manifest.parts}
    for part in reference.manifest.parts:
        if names := quantized_layers(load_graph(reference, part)):
            raise ExportError(
                f"{reference.root}: {part} must not be quantised to be a reference, its layer {names[0]} is; "
                "give the bundle that it was made from"
            )
    if plan.judge is not None:
        check_judge(cases, scene)
    ours, theirs = (Stages(b, cases, scene, candidate.manifest.reference_dtype) for b in (candidate, reference))
    same = same_parts(candidate, reference)
    measures: list[Measure] = []

    progress("text", 0, 2)
    text = theirs.encode()
    progress("text", 1, 2)
    own_text = text if {p for p in reference.manifest.parts if p.startswith("text_encoder")} <= same else ours.encode()
    progress("text", 2, 2)
    measures += _text(cases, own_text, text)
    modulation = theirs.modulation(text.pooled)
    given, own = ours.modulation(text.pooled), ours.modulation(own_text.pooled)
    measures.append(_modulation(cases, text, given, modulation))

    batches = theirs.batches(text, modulation)
    alike = own_text is text and np.array_equal(own, modulation)
    own_batches = batches if alike else ours.batches(own_text, own)
    steps = scene.num_inference_steps
    trajectory = theirs.draw(batches, _counter(progress, "reference", steps * len(batches)))
    final, found = _backbone(ours, batches, own_batches, trajectory, progress)
    measures += found

    layers: list[LayerDrift] = []
    for part, names in quantized.items():
        if names:
            layers += _layers(reference, candidate, part, text, batches, trajectory, progress)

    progress("pictures", 0, 3)
    drawn = theirs.decode(trajectory.latents[-1])
    progress("pictures", 1, 3)
    given_pictures = drawn if "vae_decoder" in same else ours.decode(trajectory.latents[-1])
    progress("pictures", 2, 3)
    own_pictures = ours.decode(final)
    progress("pictures", 3, 3)
    measures += _pictures(drawn, given_pictures, own_pictures)
    shown = Pictures(tuple(c.prompt for c in cases), drawn, own_pictures)
    judged = None if plan.judge is None else judge_pictures(plan.judge, cases, shown.reference, shown.candidate)
    sensitivity = _sensitivity(reference, candidate, cases, scene, text, layers, plan, progress)
    report = Report(
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


def _text(cases: Sequence[Case], got: Text, reference: Text) -> list[Measure]:
    def errors(name: str) -> list[np.ndarray]:
        pairs = [
            (getattr(got.embeddings[c.prompt], name), getattr(reference.embeddings[c.prompt], name)) for c in cases
        ]
        return [relative_error(a, b) for a, b in pairs if b is not None]

    found: list[Measure] = []
    for what, name in (("text states", "states"), ("pooled text", "pooled")):
        if values := errors(name):
            found.append(Measure("parts", what, _RELATIVE, mean(np.concatenate(values))))
    return found


def _modulation(cases: Sequence[Case], text: Text, got: np.ndarray, reference: np.ndarray) -> Measure:
    """[S, U, M] twice; of all steps together."""
    place = {p: i for i, p in enumerate(text.embeddings)}
    rows = [place[c.prompt] if reference.shape[1] > 1 else 0 for c in cases]
    values = relative_error(np.moveaxis(got, 1, 0), np.moveaxis(reference, 1, 0))[rows]
    return Measure("parts", "modulation", _RELATIVE, mean(values))


def _backbone(
    stages: Stages, given: list[Batch], own: list[Batch], reference: Trajectory, progress: Progress
) -> tuple[np.ndarray, list[Measure]]:
    """The candidate's backbone on the reference's inputs and by itself: its final latents [n, N, C], and measures."""
    heads, ends = [], []
    count = _counter(progress, "candidate", 2 * stages.scene.num_inference_steps)
    x = reference.latents[0]
    with stages.use_backbone() as run:
        for step, (sigma, sigma_next) in enumerate(pairwise(stages.sigmas)):
            found = predict_all(run, given, step, reference.latents[step])
            count()
            for name in HEADS:
                values = relative_error(found[name], reference.heads[step][name])
                heads.append(Measure("parts", name, _RELATIVE, mean(values), step))
            if step or own is not given:  # otherwise it begins with the reference's inputs
                found = predict_all(run, own, step, x)
            x = advance(x, found, float(sigma), float(sigma_next))
            count()
            values = relative_error(x, reference.latents[step + 1])
            ends.append(Measure("end to end", "latents", _RELATIVE, mean(values), step))
    return x, heads + ends


def _layers(
    reference: Bundle,
    candidate: Bundle,
    part: str,
    text: Text,
    batches: list[Batch],
    trajectory: Trajectory,
    progress: Progress,
) -> list[LayerDrift]:
    """Local errors of a part's layers on the reference's inputs."""
    if part == "backbone":
        steps = len(trajectory.heads)
        inputs = [list(backbone_inputs(batches, trajectory, step)) for step in range(steps)]
    elif part in ("text_encoder", "text_encoder_2"):
        inputs = [[{"input_ids": tokens.ids[part]} for tokens in text.tokens.values()]]
    else:
        raise ExportError(
            f"{candidate.root}: {part} has quantised layers, which can be measured in the backbone and text encoders "
            "only; leave it out of the policy"
        )
    count = _counter(progress, f"layers of {part}", sum(map(len, inputs)))
    return drift_of_layers(reference, candidate, part, list(inputs), count)


def _pictures(reference: np.ndarray, given: np.ndarray, own: np.ndarray) -> list[Measure]:
    """The decoder on the reference's latents, and whole pictures."""
    return [
        Measure("parts", "VAE image", _RELATIVE, mean(relative_error(given, reference.astype(np.float64)))),
        Measure("end to end", "PSNR", _DB, mean(psnr_db(own, reference))),
        Measure("end to end", "GMSD", _PLAIN, mean(gmsd(own, reference))),
    ]


def _sensitivity(
    reference: Bundle,
    candidate: Bundle,
    cases: Sequence[Case],
    scene: Scene,
    text: Text,
    layers: Sequence[LayerDrift],
    plan: Plan,
    progress: Progress,
) -> Sensitivity | None:
    """On some of the cases, spread over all; their text is encoded already."""
    if plan.sensitivity == "none" or not any(d.part == "backbone" for d in layers):
        return None
    some = list(cases[:: -(-len(cases) // PROMPTS)])
    stages = Stages(reference, some, scene, candidate.manifest.reference_dtype)
    kept = {c.prompt: text.embeddings[c.prompt] for c in some}
    encoded = dataclasses.replace(text, embeddings=kept)
    batches = stages.batches(encoded, stages.modulation(encoded.pooled))
    trajectory = stages.draw(batches)
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
    return gate.check(
        limits,
        layers,
        by_name["means"],
        by_name["latents"][-1],
        by_name["PSNR"][0],
        None if judged is None else judged.drop,
    )


def _settings(
    candidate: Bundle, reference: Bundle, cases: Sequence[Case], scene: Scene, plan: Plan
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
        **dataclasses.asdict(scene),
    }


def _counter(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """A function to call `total` times."""
    done = 0
    progress(stage, 0, total)

    def count() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    return count
