"""Compare two bundles on a group of cases -> errors of every part for each case, errors of layers, and images.

Each part runs on the reference's inputs, so that an error shows in the part that causes it. Then each bundle generates
by itself from the same noise. Parts run one after the other; their outputs are kept for this group only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.drift.comparable import same_parts
from arcflow_export.drift.layers import LayerErrors, measure_layers
from arcflow_export.drift.measures import gmsd, psnr_db, relative_error
from arcflow_export.drift.stages import (
    BundleStages,
    CaseBatch,
    EncodedCases,
    Trajectory,
    advance,
    backbone_inputs,
    predict,
)
from arcflow_export.errors import ExportError
from arcflow_export.progress import StageProgress
from arcflow_runtime.disk.bundle import Bundle

_RELATIVE, _DB, _PLAIN = "relative RMS error", "dB", "0 is equal"


@dataclass(frozen=True)
class Quantity:
    """A measured quantity: `group` is one of `report.GROUPS`; `step` is None if the quantity has no step."""

    group: str
    what: str
    unit: str
    step: int | None = None


@dataclass
class CaseErrors:
    """Results for n cases: the values [n] of every quantity, the errors of layers by part, and the images [n, H, W, 3]
    uint8 of reference and candidate.
    """

    values: dict[Quantity, np.ndarray]
    layers: dict[str, LayerErrors]
    reference: np.ndarray
    candidate: np.ndarray


class EndToEnd(Protocol):
    """Generates the cases with the candidate's engines instead of its graphs."""

    def generate(self, cases: Sequence[DriftCase]) -> tuple[list[np.ndarray], np.ndarray]:
        """Generate the cases: latents [n, N, C] float32 after every step, and images [n, H, W, 3] uint8."""
        ...


def compare_cases(
    candidate: Bundle,
    reference: Bundle,
    cases: Sequence[DriftCase],
    scene: ImageSettings,
    quantized: Sequence[str],
    engines: EndToEnd | None,
    progress: StageProgress,
) -> CaseErrors:
    """Measure a group of cases. A part whose files are equal in both bundles runs once.

    Args:
        candidate: the bundle to check.
        reference: an unquantised bundle of the same student.
        cases: prompts and seeds to generate.
        scene: image size, steps, guidance and text length for all cases.
        quantized: the candidate's parts that have quantised layers.
        engines: generates the candidate's images end to end; None uses its graphs.
        progress: receives each stage's name, the work done and its total.
    """
    ours, theirs = (BundleStages(b, cases, scene, candidate.manifest.reference_dtype) for b in (candidate, reference))
    same = same_parts(candidate, reference)
    values: dict[Quantity, np.ndarray] = {}

    progress("text", 0, 2)
    text = theirs.encode()
    progress("text", 1, 2)
    own_text = text if {p for p in reference.manifest.parts if p.startswith("text_encoder")} <= same else ours.encode()
    progress("text", 2, 2)
    values |= _text(cases, own_text, text)
    modulation = theirs.modulation(text.pooled)
    given, own = ours.modulation(text.pooled), ours.modulation(own_text.pooled)
    values |= _modulation(cases, text, given, modulation)

    batches = theirs.batches(text, modulation)
    alike = own_text is text and np.array_equal(own, modulation)
    own_batches = batches if alike else ours.batches(own_text, own)
    steps = scene.num_inference_steps
    trajectory = theirs.generate(batches, _counter(progress, "reference", steps * len(batches)))
    ends, heads = _backbone(ours, batches, own_batches, trajectory, engines is None, progress)
    values |= heads
    own_images = None
    if engines is not None:
        ends, own_images = engines.generate(cases)
    for step, x in enumerate(ends):
        errors = relative_error(x, trajectory.latents[step + 1])
        values[Quantity("end to end", "latents", _RELATIVE, step)] = errors
    layers = {}
    for part in quantized:
        inputs = _layer_inputs(part, theirs, text, batches, trajectory)
        count = _counter(progress, f"layers of {part}", sum(map(len, inputs)))
        layers[part] = measure_layers(reference, candidate, part, inputs, count)
    trajectory.heads.clear()

    progress("images", 0, 3)
    reference_images = theirs.decode(trajectory.latents[-1])
    progress("images", 1, 3)
    given_images = reference_images if "vae_decoder" in same else ours.decode(trajectory.latents[-1])
    progress("images", 2, 3)
    if own_images is None:
        own_images = ours.decode(ends[-1])
    progress("images", 3, 3)
    values |= _images(reference_images, given_images, own_images)
    return CaseErrors(values, layers, reference_images, own_images)


def _text(cases: Sequence[DriftCase], got: EncodedCases, reference: EncodedCases) -> dict[Quantity, np.ndarray]:
    def errors(name: str) -> list[np.ndarray]:
        pairs = [
            (getattr(got.embeddings[c.prompt], name), getattr(reference.embeddings[c.prompt], name)) for c in cases
        ]
        return [relative_error(a, b) for a, b in pairs if b is not None]

    return {
        Quantity("parts", what, _RELATIVE): np.concatenate(values)
        for what, name in (("text states", "states"), ("pooled text", "pooled"))
        if (values := errors(name))
    }


def _modulation(
    cases: Sequence[DriftCase], text: EncodedCases, got: np.ndarray, reference: np.ndarray
) -> dict[Quantity, np.ndarray]:
    """Errors of the modulation, two arrays [S, U, M], over all steps together."""
    place = {p: i for i, p in enumerate(text.embeddings)}
    rows = [place[c.prompt] if reference.shape[1] > 1 else 0 for c in cases]
    values = relative_error(np.moveaxis(got, 1, 0), np.moveaxis(reference, 1, 0))[rows]
    return {Quantity("parts", "modulation", _RELATIVE): values}


def _backbone(
    stages: BundleStages,
    given: list[CaseBatch],
    own: list[CaseBatch],
    reference: Trajectory,
    end_to_end: bool,
    progress: StageProgress,
) -> tuple[list[np.ndarray], dict[Quantity, np.ndarray]]:
    """Run the candidate's backbone on the reference's inputs and, with `end_to_end`, also on its own latents.

    Returns:
        Its own latents [n, N, C] after every step (none without `end_to_end`), and the errors of its heads.
    """
    heads: dict[Quantity, np.ndarray] = {}
    ends: list[np.ndarray] = []
    steps = stages.scene.num_inference_steps
    alone = [end_to_end and (step > 0 or own is not given) for step in range(steps)]
    total = steps * len(given) + sum(alone) * len(own)
    count = _counter(progress, "candidate", total)
    x = reference.latents[0]
    with stages.use_backbone() as run_all:
        for step, (sigma, sigma_next) in enumerate(pairwise(stages.sigmas)):
            asked = [(given, reference.latents[step])] + ([(own, x)] if alone[step] else [])
            found, *rest = predict(run_all, step, asked, count)
            for name in found:
                values = relative_error(found[name], reference.heads[step][name])
                heads[Quantity("parts", name, _RELATIVE, step)] = values
            if end_to_end:
                x = advance(x, rest[0] if rest else found, float(sigma), float(sigma_next))
                ends.append(x)
    return ends, heads


def _layer_inputs(
    part: str, stages: BundleStages, text: EncodedCases, batches: list[CaseBatch], trajectory: Trajectory
) -> list[list[Mapping[str, np.ndarray]]]:
    """A part's inputs in the reference's run, by step and batch."""
    if part == "backbone":
        return [list(backbone_inputs(batches, trajectory, step)) for step in range(len(trajectory.heads))]
    if part in ("text_encoder", "text_encoder_2"):
        return [[{"input_ids": tokens.ids[part]} for tokens in text.tokens.values()]]
    if part == "conditioner":
        return [[stages.conditioner_inputs(text.pooled)]]
    raise ExportError(
        f"{part} has quantised layers, which can be measured in the backbone, the conditioner and the text encoders "
        "only; leave it out of the policy"
    )


def _images(reference: np.ndarray, given: np.ndarray, own: np.ndarray) -> dict[Quantity, np.ndarray]:
    """Errors of the decoder on the reference's latents, and of the images end to end."""
    return {
        Quantity("parts", "VAE image", _RELATIVE): _one_by_one(relative_error, given, reference),
        Quantity("end to end", "PSNR", _DB): _one_by_one(psnr_db, own, reference),
        Quantity("end to end", "GMSD", _PLAIN): _one_by_one(gmsd, own, reference),
    }


def _one_by_one(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray], got: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Apply a measure to uint8 images one by one, so that only one is in memory as float64."""
    return np.concatenate(
        [measure(a[None].astype(np.float64), b[None].astype(np.float64)) for a, b in zip(got, reference, strict=True)]
    )


def _counter(progress: StageProgress, stage: str, total: int) -> Callable[[], None]:
    """A function that reports one more unit of `total` each time that it is called."""
    steps: Iterator[int] = iter(range(1, total + 1))
    progress(stage, 0, total)
    return lambda: progress(stage, next(steps), total)
