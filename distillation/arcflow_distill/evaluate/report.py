"""The report of an evaluation: scores -> the contents of `eval.json`, and tables for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arcflow_distill.evaluate.scores import FRECHET_RESAMPLES, MEAN_RESAMPLES, SCORED, Difference, Score
from arcflow_export.images.cases import ALL, GROUPS
from arcflow_export.images.statistics import Interval

FORMAT, VERSION = "arcflow-eval", 1
_TITLES = {
    ALL: "All prompts",
    GROUPS[0]: "Shapes and colours seen together in training",
    GROUPS[1]: "Shapes and colours never seen together in training",
}
_MISSING = ""


@dataclass(frozen=True)
class SamplerReport:
    """One sampler's scores by group; for real images `network_calls` is 0."""

    name: str
    label: str
    network_calls: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class EvaluationReport:
    """All results of an evaluation.

    `settings` and `versions` allow to repeat it. `judge_rates` are the judge's own error rates (see `judge_rates`).
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    judge_rates: dict[str, float]
    samplers: tuple[SamplerReport, ...]
    differences: tuple[Difference, ...]

    def as_json(self) -> dict[str, Any]:
        """The contents of `eval.json`."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def table(self) -> str:
        """The tables of scores and differences, in Markdown."""
        blocks = [f"## {_TITLES[group]}\n\n{self._scores(group)}" for group in SCORED]
        if self.differences:
            blocks.append(f"## Students minus few Euler steps of the teacher\n\n{self._differences()}")
        return "\n\n".join([*blocks, self._notes()]) + "\n"

    def _scores(self, group: str) -> str:
        head = ("sampler", "calls", "named right, %", "right and clean, %", "PSNR, dB", "latent error", "Fréchet")
        rows = []
        for sampler in self.samplers:
            s = sampler.scores[group]
            cells = (_percent(s.named), _percent(s.right), _cell(s.psnr_db, 1), _cell(s.latent_error_relative, 4))
            rows.append((sampler.label, str(sampler.network_calls or _MISSING), *cells, _cell(s.frechet, 4)))
        return _markdown(head, rows)

    def _differences(self) -> str:
        labels = {s.name: s.label for s in self.samplers}
        rows = [
            (
                f"{labels[d.student]} - {labels[d.baseline]}",
                d.group,
                _cell(d.latent_error_relative, 4),
                _cell(d.frechet, 4),
            )
            for d in self.differences
        ]
        return _markdown(("difference", "prompts", "latent error", "Fréchet"), rows)

    def _notes(self) -> str:
        counts, steps = self.settings["prompts"], max(self.settings["teacher_steps"])
        return (
            f"{counts[GROUPS[0]]} and {counts[GROUPS[1]]} prompts, one image each, the same noise for every sampler. "
            "In brackets: 95 % bootstrap intervals "
            f"({MEAN_RESAMPLES} resamples of the images; Fréchet: ±1.96 standard errors, {FRECHET_RESAMPLES}). "
            f"PSNR and latent error compare with the teacher's {steps} steps; latent error is in units of the variance "
            "of the teacher's latents. The Fréchet distance compares the judge's features with those of real images of "
            "the same captions, in units of the real features' total variance. It is too large by about the same "
            "amount in every row, because all rows have equally many images; the row of real images shows it."
        )


def _percent(interval: Interval) -> str:
    return _cell(Interval(100 * interval.value, 100 * interval.low, 100 * interval.high), 1)


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return _MISSING
    # Adding zero turns a rounded -0 into 0.
    value, low, high = (f"{round(x, digits) + 0.0:.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text; all columns but the first are aligned right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (widths[0] + 2)}", *(f"{'-' * (w + 1)}:" for w in widths[1:])]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *(line(row) for row in rows)])
