"""Score samplers: images and latents -> shares of right images, errors and distances, with 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from arcflow_distill.evaluate.samplers import Generated
from arcflow_export.images.cases import ALL, GROUPS, Cases
from arcflow_export.images.judge import Judge, Reading, to_tensor
from arcflow_export.images.statistics import (
    Interval,
    frechet,
    frechet_replicates,
    mean_interval,
    moments,
    normal_interval,
    resample,
)

MEAN_RESAMPLES, FRECHET_RESAMPLES = 1000, 200
#: The sets of prompts that are scored: all prompts, and each group.
SCORED = (ALL, *GROUPS)
#: Mean squared errors are clipped to at least this, so that equal images have a PSNR of 100 dB.
_LEAST_ERROR = 1e-10


@dataclass(frozen=True)
class Score:
    """The scores of one sampler in one group.

    `named`: share of images with all named attributes right. `right`: share that is also clean. `frechet`: distance of
    the judge's features from those of real images of the same captions, in units of the total variance of the real
    features over all prompts; its small-sample bias is about the same for all samplers, because they have equally many
    images. `psnr_db`: mean over images, peak 1. `latent_error`: mean squared difference of the final latents.
    `latent_error_relative`: the same in units of the variance of the reference's latents over all prompts. The last
    three compare with the reference; they are None for the reference itself and for real images.
    """

    named: Interval
    right: Interval
    frechet: Interval
    psnr_db: Interval | None = None
    latent_error: Interval | None = None
    latent_error_relative: Interval | None = None


@dataclass(frozen=True)
class Difference:
    """A student's errors minus those of the teacher with few Euler steps, paired by prompt and noise.

    Below 0, the student is better.
    """

    student: str
    baseline: str
    group: str
    latent_error_relative: Interval
    frechet: Interval


class Scorer:
    """Scores samplers against one reference and one set of real images; all use the same bootstrap resamples."""

    def __init__(self, cases: Cases, judge: Judge, real: torch.Tensor, reference: Generated, seed: int) -> None:
        """Prepare the scores.

        Args:
            cases: the prompts.
            judge: the judge that reads the images.
            real: real images of the captions, [B, 3, 64, 64] in [0, 1].
            reference: the images and latents that all samplers are compared with.
            seed: seed of the bootstrap resamples.
        """
        self._cases, self._judge, self._reference = cases, judge, reference
        features = judge.read(real).features.numpy()
        self._spread = float(np.sqrt(features.astype(np.float64).var(0).sum()))
        self._real = features / self._spread
        self._variance = float(reference.latents.astype(np.float64).var())
        sizes = {group: len(cases.rows(group)) for group in SCORED}
        self._draws = {group: resample(size, MEAN_RESAMPLES, seed) for group, size in sizes.items()}
        self._frechet_draws = {group: resample(size, FRECHET_RESAMPLES, seed) for group, size in sizes.items()}
        #: By sampler and group: relative latent errors [n], the Frechet distance and its replicates [R].
        self._kept: dict[tuple[str, str], tuple[np.ndarray, float, np.ndarray]] = {}

    def score_real(self, images: torch.Tensor) -> dict[str, Score]:
        """Score other real images [B, 3, 64, 64]; a perfect sampler would get these scores."""
        reading = self._judge.read(images)
        return {group: self._judged(reading, group)[0] for group in SCORED}

    def score(self, name: str, generated: Generated) -> dict[str, Score]:
        """Score a sampler's images; the reference itself gets no error scores."""
        reading = self._judge.read(to_tensor(generated.images))
        return {group: self._score(name, generated, reading, group) for group in SCORED}

    def difference(self, student: str, baseline: str, group: str) -> Difference:
        """The paired difference of two samplers that have been scored."""
        ours, theirs = self._kept[student, group], self._kept[baseline, group]
        return Difference(
            student,
            baseline,
            group,
            mean_interval(ours[0] - theirs[0], self._draws[group]),
            normal_interval(ours[1] - theirs[1], ours[2] - theirs[2]),
        )

    def _score(self, name: str, generated: Generated, reading: Reading, group: str) -> Score:
        judged, replicates = self._judged(reading, group)
        if generated is self._reference:
            return judged
        rows, draws = self._cases.rows(group), self._draws[group]
        error = _squared(generated.latents[rows], self._reference.latents[rows])
        pixels = _squared(generated.images[rows] / 255, self._reference.images[rows] / 255)
        relative = error / self._variance
        self._kept[name, group] = (relative, judged.frechet.value, replicates)
        return Score(
            judged.named,
            judged.right,
            judged.frechet,
            mean_interval(-10 * np.log10(pixels.clip(min=_LEAST_ERROR)), draws),
            mean_interval(error, draws),
            mean_interval(relative, draws),
        )

    def _judged(self, reading: Reading, group: str) -> tuple[Score, np.ndarray]:
        """The scores that need no reference, and the bootstrap replicates of the Frechet distance."""
        rows, draws = self._cases.rows(group), self._draws[group]
        named, right = reading.named(self._cases.words).numpy(), reading.right(self._cases.words).numpy()
        features, real = reading.features.numpy()[rows] / self._spread, self._real[rows]
        replicates = frechet_replicates(features, real, self._frechet_draws[group])
        distance = normal_interval(frechet(*moments(features), *moments(real)), replicates)
        return Score(mean_interval(named[rows], draws), mean_interval(right[rows], draws), distance), replicates


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference of each row, float64 [B]."""
    return np.square(a.astype(np.float64) - b.astype(np.float64)).reshape(len(a), -1).mean(1)
