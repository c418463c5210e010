"""The report of the drift gate: measurements -> the contents of drift.json, and tables for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arcflow_export.drift.gate import MAIN_HEADS, SHOWN, Breach, ranked
from arcflow_export.drift.judged import Judged
from arcflow_export.drift.layers import LayerDrift
from arcflow_export.drift.measures import RESAMPLES
from arcflow_export.drift.sensitivity import PART as SENSITIVE
from arcflow_export.drift.sensitivity import Sensitivity
from arcflow_export.formats.thresholds import Thresholds
from arcflow_export.images.statistics import Interval

FORMAT, VERSION = "arcflow-drift", 1
#: How a measure is taken: each part on the reference's inputs, or a whole run from the noise.
GROUPS = ("parts", "end to end")


#: Largest number of prompts on the contact sheet.
COLUMNS = 8


def shown_places(count: int) -> list[int]:
    """The indices of the cases that the contact sheet shows, spread evenly over `count` cases."""
    return list(range(0, count, -(-count // COLUMNS)))


@dataclass(frozen=True)
class Measure:
    """One measured quantity, its mean over prompts; `group` is one of `GROUPS`."""

    group: str
    what: str
    unit: str
    interval: Interval
    step: int | None = None

    @property
    def name(self) -> str:
        """The quantity's name, with its step if it has one."""
        return self.what if self.step is None else f"step {self.step} {self.what}"


@dataclass(frozen=True)
class DriftReport:
    """All results of a comparison; `settings` and `versions` allow to repeat it."""

    settings: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...]
    thresholds: Thresholds
    measures: tuple[Measure, ...]
    judged: Judged | None
    layers: tuple[LayerDrift, ...]
    sensitivity: Sensitivity | None
    breaches: tuple[Breach, ...]

    @property
    def passed(self) -> bool:
        """True if every threshold holds."""
        return not self.breaches

    def as_json(self) -> dict[str, Any]:
        """The contents of `drift.json`; NaN and infinite numbers become null."""
        head = {"format": FORMAT, "version": VERSION, "passed": self.passed, "exclude": self.exclude()[0]}
        data = head | dataclasses.asdict(self)
        cleaned: dict[str, Any] = _finite(data)
        return cleaned

    def exclude(self) -> tuple[dict[str, tuple[str, ...]], str]:
        """Suggested `exclude` patterns by part, and the reason; empty if the gate passes or they would not help."""
        if self.passed:
            return {}, ""
        s = self.sensitivity
        if s is not None and s.exclude:
            return {SENSITIVE: s.exclude}, f"the smallest set of {s.kind} found that makes the thresholds hold"
        worst = ranked(self.layers, self.thresholds)
        if broken := [d for d in worst if d.badness(self.thresholds) > 1]:
            return _by_part(broken), "the layers past their own limit; calibrating again may fix them"
        if s is not None and s.exclude is None:
            return {}, "leaving out layers does not help: the error is in the arithmetic or in another part"
        if s is not None:
            return (
                {},
                "leaving out layers does not help: with the reference's text the backbone is within the thresholds",
            )
        return _by_part(
            worst[:SHOWN]
        ), "a first guess from their errors; --sensitivity layers finds the smallest set that is enough"

    def verdict(self) -> str:
        """The gate's result in text, for the terminal and the report."""
        if self.passed:
            return "PASSED: every threshold holds"
        lines = [f"FAILED: {len(self.breaches)} thresholds do not hold", *(f"  {b.text()}" for b in self.breaches)]
        if worst := ranked(self.layers, self.thresholds)[:SHOWN]:
            lines += ["worst layers", *(f"  {d.layer}: relative error {d.error:.4g}" for d in worst)]
        exclude, reason = self.exclude()
        if exclude:
            lines.append(f"leave out ({reason})")
        elif reason:
            lines.append(reason)
        for part, patterns in exclude.items():
            lines += [f"  [parts.{part}]", "  exclude = [", *(f'      "{p}",' for p in patterns), "  ]"]
        return "\n".join(lines)

    def text(self) -> str:
        """The tables and the verdict in Markdown."""
        s = self.settings
        size = f"{s['width_px']}x{s['height_px']}"
        negative = s["negative_prompt"]
        guided = "" if negative is None else f"guided away from {negative!r} with scale {s['true_cfg_scale']:g}, "
        head = (
            f"# Drift of {s['candidate']} from {s['reference']}\n\n"
            f"{s['count']} prompts ({s['prompts']}), {size}, {s['num_inference_steps']} steps, seeds from {s['seed']}, "
            f"{guided}thresholds of the policy {s['policy']}. "
            f"Means over prompts, in brackets 95 % bootstrap intervals ({RESAMPLES} resamples of the prompts)."
        )
        blocks = [head, *self.notes, f"```\n{self.verdict()}\n```", f"## Measures\n\n{self._measures()}"]
        if self.judged is not None:
            blocks.append(f"## Judge\n\n{self._judge(self.judged)}")
        if self.layers:
            blocks.append(f"## Quantised layers\n\n{self._layers()}")
        if self.sensitivity is not None:
            blocks.append(f"## Sensitivity\n\n{self._sensitivity(self.sensitivity)}")
        return "\n\n".join(blocks) + "\n"

    def summary(self) -> str:
        """The measures and the verdict, for the terminal."""
        judge = "" if self.judged is None else f"\n\n{self._judge(self.judged)}"
        sensitivity = "" if self.sensitivity is None else f"\n\n{self._sensitivity(self.sensitivity)}"
        return f"{self._measures()}{judge}{sensitivity}\n\n{self.verdict()}"

    def _measures(self) -> str:
        final = [m for m in self.measures if m.what == "latents"][-1]
        limits = {final.name: _limit("<=", self.thresholds.latents), "PSNR": _limit(">=", self.thresholds.psnr)}
        limits |= {m.name: _limit("<=", self.thresholds.heads) for m in self.measures if m.what in MAIN_HEADS}
        rows = [(m.group, m.name, _cell(m.interval), m.unit, limits.get(m.name, "")) for m in self.measures]
        return _markdown(("where", "quantity", "mean", "unit", "threshold"), rows, left=2)

    def _judge(self, judged: Judged) -> str:
        rows = []
        for what, share in (("named right", judged.named), ("right and clean", judged.right)):
            cells = (_percent(i) for i in (share.reference, share.candidate, share.difference))
            limit = self.thresholds.judge
            rows.append((what, *cells, _limit(">=", None if limit is None else -100 * limit)))
        return _markdown(("share, %", "reference", "candidate", "difference, paired", "threshold"), rows)

    def _layers(self) -> str:
        rows = []
        for d in ranked(self.layers, self.thresholds):
            errors = ", ".join(f"{e:.4f}" for e in d.errors)
            reach = "" if d.reach is None else ", ".join(f"{r:.2f}" for r in d.reach)
            mark = "past its limit" if d.badness(self.thresholds) > 1 else ""
            rows.append((d.layer, d.part, errors, reach, mark))
        note = (
            "For each step: the relative RMS error of the layer's output, given the reference's input, and its largest "
            "input divided by the largest number that its scale can represent."
        )
        return f"{note}\n\n{_markdown(('layer', 'part', 'error', 'input / range', ''), rows, left=2)}"

    def _sensitivity(self, s: Sensitivity) -> str:
        rows: list[tuple[str, ...]] = [
            ("all", f"{s.whole.heads:.4f}", f"{s.whole.latents:.4f}", f"{s.none.heads:.4f}", f"{s.none.latents:.4f}")
        ]
        for u in s.units:
            effects = (u.alone.heads, u.alone.latents, u.left_out.heads, u.left_out.latents)
            rows.append((u.name, *(f"{e:.4f}" for e in effects)))
        head = (s.kind, "alone: heads", "alone: latents", "left out: heads", "left out: latents")
        note = (
            f"{s.prompts} prompts; the backbone runs with the reference's text and modulation. Relative RMS errors of "
            "the means at the worst step and of the final latents: with only one unit quantised, and with all but "
            "that one. Units that gain most when left out come first. `all` left out is the error of the arithmetic."
        )
        return f"{note}\n\n{_markdown(head, rows)}"


def _by_part(layers: Sequence[LayerDrift]) -> dict[str, tuple[str, ...]]:
    parts = dict.fromkeys(d.part for d in layers)
    return {part: tuple(d.layer for d in layers if d.part == part) for part in parts}


def _limit(sign: str, limit: float | None) -> str:
    return "" if limit is None else f"{sign} {limit:g}"


def _cell(interval: Interval) -> str:
    if not math.isfinite(interval.value):
        return "not finite"
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def _percent(interval: Interval) -> str:
    value, low, high = (f"{round(100 * x, 1) + 0.0:.1f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that is also aligned as plain text; columns after the first `left` are aligned right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w + 2)}" if i < left else f"{'-' * (w + 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *(line(row) for row in rows)])


def _finite(value: Any) -> Any:
    """Replace infinities and NaN by None, because JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
