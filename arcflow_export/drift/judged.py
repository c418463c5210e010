"""Judge both bundles' images of shapes -> the shares of right images, and their paired difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcflow_export.drift.cases import SHAPES, DriftCase, ImageSettings
from arcflow_export.drift.measures import mean
from arcflow_export.images.statistics import Interval
from arcflow_runtime.errors import RequestError


@dataclass(frozen=True)
class Share:
    """A share of images: the reference's, the candidate's, and candidate minus reference, paired by prompt."""

    reference: Interval
    candidate: Interval
    difference: Interval


@dataclass(frozen=True)
class Judged:
    """The judge's shares. `named`: all attributes that the caption names are right. `right`: and the image is clean."""

    named: Share
    right: Share

    @property
    def drop(self) -> Interval:
        """The larger drop of the two shares."""
        worse = min(self.named.difference, self.right.difference, key=lambda i: i.value)
        return Interval(-worse.value, -worse.high, -worse.low)


def check_judge(cases: Sequence[DriftCase], scene: ImageSettings) -> None:
    """Check that the judge can read the images of these cases.

    Raises:
        RequestError: the prompts are not captions of shapes, or the images have another size.
    """
    from arcflow_export.images.scenes import RESOLUTION

    if any(case.words is None for case in cases):
        raise RequestError(f"--judge needs --prompts {SHAPES}: it knows what attributes these captions name")
    if (scene.height_px, scene.width_px) != (RESOLUTION, RESOLUTION):
        raise RequestError(
            f"--judge reads images of {RESOLUTION}x{RESOLUTION}, got {scene.width_px}x{scene.height_px}; "
            "give --height and --width"
        )


def judge_images(folder: Path, cases: Sequence[DriftCase], reference: np.ndarray, candidate: np.ndarray) -> Judged:
    """Judge both sides' images [n, 64, 64, 3] uint8.

    Raises:
        SourceError: the judge is missing or damaged.
    """
    from arcflow_export.images.judge import Judge, to_tensor

    judge = Judge.load(folder)
    words = [case.words or {} for case in cases]
    readings = [judge.read(to_tensor(images)) for images in (reference, candidate)]
    named = [r.named(words).numpy().astype(np.float64) for r in readings]
    right = [r.right(words).numpy().astype(np.float64) for r in readings]
    return Judged(*(Share(mean(a), mean(b), mean(b - a)) for a, b in (named, right)))
