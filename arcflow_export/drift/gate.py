"""Compare measurements with a policy's thresholds -> the thresholds that do not hold, by how much, and hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arcflow_export.drift.layers import LayerDrift
from arcflow_export.formats.thresholds import Thresholds, times
from arcflow_export.images.statistics import Interval

#: Number of worst layers to name when a threshold does not hold.
SHOWN = 3


@dataclass(frozen=True)
class Breach:
    """A threshold that does not hold: its name, what was measured, value and limit, the layer to blame, a hint."""

    threshold: str
    what: str
    value: float
    limit: float
    layer: str | None = None
    hint: str = ""

    def text(self) -> str:
        """The breach as one line of text."""
        where = f"{self.layer}: " if self.layer else ""
        if self.threshold == "psnr":
            line = f"{where}{self.what} {self.value:.2f} dB, must be at least {self.limit:g} dB ({self.threshold})"
        else:
            over = times(self.value, self.limit)
            line = f"{where}{self.what} {self.value:.4g}, must be at most {self.limit:g} "
            line += f"({self.threshold}, {over:.3g} times)"
        return f"{line}; {self.hint}" if self.hint else line


#: The backbone's output that carries the picture: of a momentum student, and of a straight one.
MAIN_HEADS = ("means", "velocity")


def check(
    limits: Thresholds,
    layers: Sequence[LayerDrift],
    heads: Sequence[Interval],
    latents: Interval,
    psnr: Interval,
    judge_drop: Interval | None,
    head: str = MAIN_HEADS[0],
) -> tuple[Breach, ...]:
    """Compare the measurements with the thresholds. Breaches of layers come first, the worst layer first.

    If the 95 % interval of a mean includes the limit, its breach says that it may be chance.

    Args:
        limits: the thresholds.
        layers: drift of the single layers.
        heads: relative error of `head` at each step.
        latents: relative error of the final latents.
        psnr: PSNR of the images in dB.
        judge_drop: drop of the judge's share, or None without a judge.
        head: the backbone's output that the threshold "heads" is for, one of `MAIN_HEADS`.
    """
    breaches: list[Breach] = []
    scales: set[str] = set()
    for d in ranked(layers, limits):
        name, error = d.layer, d.error
        if d.scale is not None and d.scale_at_fault(limits):
            # Linears that share a wrong scale get one breach, with the largest of their errors.
            if d.scale in scales:
                continue
            scales.add(d.scale)
            name, error = d.scale, max(other.error for other in layers if other.scale == d.scale)
        what = "its input scale's range over its largest input"
        breaches += _past("layers", "relative error of its output", error, limits.layers, name, d.reason())
        breaches += _past("headroom", what, d.headroom, limits.headroom, name, d.reason())
    step = max(range(len(heads)), key=lambda i: heads[i].value)
    breaches += _mean_past("heads", f"relative error of the {head} at step {step}", heads[step], limits.heads)
    breaches += _mean_past("latents", "relative error of the final latents", latents, limits.latents)
    breaches += _mean_past("judge", "drop of the judge's share", judge_drop, limits.judge)
    if limits.psnr is not None and not psnr.value >= limits.psnr:
        chance = _chance(psnr, psnr.high >= limits.psnr)
        breaches.append(Breach("psnr", "PSNR of the images", psnr.value, limits.psnr, None, chance))
    return tuple(breaches)


def ranked(layers: Sequence[LayerDrift], limits: Thresholds) -> list[LayerDrift]:
    """Sort layers from the worst: first those past a limit, by how far, then the others by their error.

    Linears that share a wrong input scale stay together; the layer that the scale is named after comes first.
    """
    shared: dict[str, float] = {}
    for d in layers:
        if d.scale is not None and d.scale_at_fault(limits):
            shared[d.scale] = max(shared.get(d.scale, 0.0), d.badness(limits))

    def key(d: LayerDrift) -> tuple[float, bool, float]:
        if d.scale in shared:
            return (-max(shared[d.scale], 1), d.layer != d.scale, -d.error)
        return (-max(d.badness(limits), 1), False, -d.error)

    return sorted(layers, key=key)


def _past(
    threshold: str, what: str, value: float | None, limit: float | None, layer: str | None = None, hint: str = ""
) -> list[Breach]:
    """A breach if `value` exceeds `limit`, else none. NaN is not <= any limit, so it counts as a breach."""
    if value is None or limit is None or value <= limit:
        return []
    return [Breach(threshold, what, value, limit, layer, hint)]


def _mean_past(threshold: str, what: str, mean: Interval | None, limit: float | None) -> list[Breach]:
    """A breach if a mean over prompts exceeds `limit`, else none."""
    if mean is None or limit is None:
        return []
    return _past(threshold, what, mean.value, limit, None, _chance(mean, mean.low <= limit))


def _chance(mean: Interval, possible: bool) -> str:
    if not possible:
        return ""
    return f"it may be chance: 95 % interval {mean.low:.4g} to {mean.high:.4g}; use more prompts"
