"""Compare the results of several subjects with the first one's: `Generated` -> rows, a table, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcflow_export.compare.generate import OTHER, STAGES, Generated
from arcflow_export.drift.cases import DriftCase
from arcflow_export.drift.measures import gmsd, psnr_db, relative_error
from arcflow_runtime.errors import RequestError


@dataclass(frozen=True)
class Row:
    """One subject's figures: means over the cases, medians for times.

    `network_speed_up` and `speed_up` divide the first subject's time by this one's. `latent_error` (relative RMS),
    `psnr_db` and `gmsd` are against the first subject's images from the same noise. `named` and `right` are the judge's
    shares: all attributes of the caption are right; and the image is clean, too. Both are None without a judge.
    """

    name: str
    steps: int
    calls: int
    seconds: float
    stages_s: Mapping[str, float]
    speed_up: float
    network_speed_up: float
    peak_bytes: int | None
    latent_error: float
    psnr_db: float
    gmsd: float
    named: float | None = None
    right: float | None = None

    @property
    def network_share(self) -> float:
        """The network's part of an image's time."""
        return self.stages_s["network"] / self.seconds


def compare(results: Sequence[Generated], cases: Sequence[DriftCase], judge: Path | None) -> list[Row]:
    """Compute one row for each subject.

    Raises:
        RequestError: the bundles' images or latents have different sizes.
        SourceError: the judge is missing or damaged.
    """
    first = results[0]
    for result in results:
        if (result.latents.shape, result.images.shape) != (first.latents.shape, first.images.shape):
            raise RequestError(
                f"{result.subject.name} must give images and latents of the sizes of {first.subject.name}, got "
                f"{list(result.images.shape[1:])}, not {list(first.images.shape[1:])}; give --height and --width"
            )
    shares = [_judged(judge, cases, r.images) if judge is not None else (None, None) for r in results]
    return [_row(result, first, *share) for result, share in zip(results, shares, strict=True)]


def _row(result: Generated, first: Generated, named: float | None, right: float | None) -> Row:
    return Row(
        result.subject.name,
        result.subject.steps,
        result.calls,
        result.total_s,
        result.stages_s,
        first.total_s / result.total_s,
        first.stages_s["network"] / result.stages_s["network"],
        result.peak_bytes,
        float(relative_error(result.latents, first.latents).mean()),
        float(psnr_db(result.images, first.images).mean()),
        float(gmsd(result.images, first.images).mean()),
        named,
        right,
    )


def _judged(folder: Path, cases: Sequence[DriftCase], images: np.ndarray) -> tuple[float, float]:
    from arcflow_export.images.judge import Judge, to_tensor

    words = [case.words or {} for case in cases]
    reading = Judge.load(folder).read(to_tensor(images))
    return float(reading.named(words).double().mean()), float(reading.right(words).double().mean())


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table. Times are seconds an image."""
    head = ["", "calls", "seconds", *STAGES, OTHER, "speed-up", "in the network", "memory, MB"]
    head += ["latent error", "PSNR, dB", "GMSD"]
    if judged := rows[0].right is not None:
        head += ["named right, %", "right and clean, %"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        stages = [f"{row.stages_s[name]:.4f}" for name in (*STAGES, OTHER)]
        memory = "unknown" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        errors = [f"{row.latent_error:.3f}", f"{row.psnr_db:.1f}", f"{row.gmsd:.3f}"]
        cells = [row.name, str(row.calls), f"{row.seconds:.4f}", *stages]
        cells += [f"{row.speed_up:.1f}x", f"{row.network_speed_up:.1f}x", memory, *errors]
        if judged and row.named is not None and row.right is not None:
            cells += [f"{row.named:.1%}".rstrip("%"), f"{row.right:.1%}".rstrip("%")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_dict(row: Row) -> dict[str, object]:
    """A row as JSON values."""
    data: dict[str, object] = dict(vars(row))
    return data | {"stages_s": dict(row.stages_s), "network_share": row.network_share}
