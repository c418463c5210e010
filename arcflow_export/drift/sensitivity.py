"""Measure how much each block or layer of the backbone adds to the drift, and suggest which to leave unquantised.

Each unit is quantised alone, and left out alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from arcflow_export.drift.gate import MAIN_HEADS
from arcflow_export.drift.graphs import block_of, leave_out, linears, quantized_layers
from arcflow_export.drift.layers import LayerDrift
from arcflow_export.drift.measures import psnr_db, relative_error
from arcflow_export.drift.stages import BundleStages, CaseBatch, Trajectory, advance, predict
from arcflow_export.emulate.blocks import BlockEngine
from arcflow_export.emulate.emulate import load_graph
from arcflow_export.formats.thresholds import Thresholds, times
from arcflow_runtime.disk.bundle import Bundle

Kind = Literal["none", "blocks", "layers"]
KINDS: tuple[Kind, ...] = ("none", "blocks", "layers")
#: Largest number of prompts to measure on.
PROMPTS = 32
PART = "backbone"


@dataclass(frozen=True)
class Effect:
    """The drift of one experiment, averaged over prompts.

    Attributes:
        heads: relative RMS error of the means (or velocity) at the worst step, on the reference's inputs.
        latents: relative RMS error of the final latents, given the reference's text and modulation.
        psnr: of the images, in dB, or None.
    """

    heads: float
    latents: float
    psnr: float | None = None

    def over(self, limits: Thresholds) -> float:
        """The factor by which the error exceeds a threshold; at most 1 if none is exceeded."""
        worst = max(times(self.heads, limits.heads), times(self.latents, limits.latents))
        # Two PSNRs that differ by d dB differ by a factor of 10^(d/20) in RMS error.
        if self.psnr is None or limits.psnr is None:
            return worst
        return max(worst, 10 ** ((limits.psnr - self.psnr) / 20))


@dataclass(frozen=True)
class Unit:
    """A block or layer: its effect when only it is quantised, and when everything but it is quantised."""

    name: str
    layers: tuple[str, ...]
    alone: Effect
    left_out: Effect


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of the backbone.

    `whole`: everything is quantised. `none`: nothing is, which leaves the error of the arithmetic. `units` are sorted
    by how much leaving them out improves the final latents, best first. `exclude`: patterns for the policy's `exclude`
    so that the thresholds for heads, latents, PSNR and single layers hold; empty if they hold already, None if leaving
    out everything does not help.
    """

    kind: Kind
    prompts: int
    whole: Effect
    none: Effect
    units: tuple[Unit, ...]
    exclude: tuple[str, ...] | None


class _Experiment:
    """Runs the candidate's backbone with any set of its layers quantised."""

    def __init__(
        self,
        reference: Bundle,
        candidate: Bundle,
        stages: BundleStages,
        batches: list[CaseBatch],
        trajectory: Trajectory,
    ) -> None:
        self._candidate, self._stages = candidate, stages
        self._batches, self._trajectory = batches, trajectory
        self._weights = linears(load_graph(reference, PART))
        self.layers = quantized_layers(load_graph(candidate, PART))
        self._images: np.ndarray | None = None

    def run(self, quantized: Collection[str], images: bool = False) -> Effect:
        """The effect of quantising only these layers; `images` also decodes, for the PSNR."""
        out = [name for name in self.layers if name not in quantized]
        model = leave_out(load_graph(self._candidate, PART), out, self._weights)
        reference = self._trajectory
        heads: list[float] = []
        x = reference.latents[0]
        with closing(BlockEngine(PART, model)) as engine:
            for step, (sigma, sigma_next) in enumerate(pairwise(self._stages.sigmas)):
                asked = [(self._batches, reference.latents[step])] + ([(self._batches, x)] if step else [])
                given, *own = predict(engine.run_all, step, asked)
                main = next(name for name in MAIN_HEADS if name in given)
                heads.append(float(relative_error(given[main], reference.heads[step][main]).mean()))
                x = advance(x, own[0] if own else given, float(sigma), float(sigma_next))
        latents = float(relative_error(x, reference.latents[-1]).mean())
        return Effect(max(heads), latents, self._psnr(x) if images else None)

    def _psnr(self, latents: np.ndarray) -> float:
        if self._images is None:
            self._images = self._stages.decode(self._trajectory.latents[-1])
        return float(psnr_db(self._stages.decode(latents), self._images).mean())


def measure_sensitivity(
    reference: Bundle,
    candidate: Bundle,
    stages: BundleStages,
    batches: list[CaseBatch],
    trajectory: Trajectory,
    drift: Sequence[LayerDrift],
    kind: Kind,
    limits: Thresholds,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Measure every unit of the backbone.

    Args:
        reference: the unquantised bundle.
        candidate: the quantised bundle.
        stages: the reference's stages, with at most `PROMPTS` cases.
        batches: these cases, encoded by the reference.
        trajectory: the reference's run of these cases.
        drift: the drift of single layers; layers past a limit are always left out.
        kind: "blocks" or "layers".
        limits: thresholds that must hold with the suggested layers left out.
        progress: called with the number of runs done and their total; runs that search for a suggestion do not count.
    """
    experiment = _Experiment(reference, candidate, stages, batches, trajectory)
    layers = experiment.layers
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(block_of(name) if kind == "blocks" else name, []).append(name)
    total, done = 2 * len(groups) + 2, 0

    def run(quantized: Collection[str], images: bool = False) -> Effect:
        nonlocal done
        effect = experiment.run(quantized, images)
        done = min(done + 1, total)
        progress(done, total)
        return effect

    whole, none = run(layers, images=True), run((), images=True)
    units = []
    for name, members in groups.items():
        rest = [layer for layer in layers if layer not in members]
        units.append(Unit(name, tuple(members), run(members), run(rest)))
    units.sort(key=lambda u: u.left_out.latents)
    broken = {d.layer for d in drift if d.part == PART and d.badness(limits) > 1}
    chosen = _choose(units, broken, whole, lambda quantized: experiment.run(quantized, images=True), layers, limits)
    exclude = None if chosen is None else tuple(_pattern(u) for u in chosen)
    return Sensitivity(kind, len(stages.cases), whole, none, tuple(units), exclude)


def _choose(
    units: Sequence[Unit],
    broken: set[str],
    whole: Effect,
    run: Callable[[Collection[str]], Effect],
    layers: Sequence[str],
    limits: Thresholds,
) -> list[Unit] | None:
    """Choose a small set of units to leave out so that the thresholds hold; None if leaving out all does not help.

    Units are added in the order of their own gain until the thresholds hold. Then unneeded units are removed.
    """

    def holds(left: Sequence[Unit]) -> bool:
        gone = {layer for u in left for layer in u.layers}
        return run([layer for layer in layers if layer not in gone]).over(limits) <= 1

    chosen = [u for u in units if broken & set(u.layers)]
    if not chosen and whole.over(limits) <= 1:
        return []
    ranked = sorted((u for u in units if u not in chosen), key=lambda u: u.left_out.over(limits))
    required = len(chosen)
    if not holds(units):
        return None
    while not (chosen and holds(chosen)):
        chosen.append(ranked.pop(0))
    for unit in chosen[required:-1]:
        fewer = [u for u in chosen if u is not unit]
        if holds(fewer):
            chosen = fewer
    return chosen


def _pattern(unit: Unit) -> str:
    """The policy pattern for a unit: the layer's name, or the block's name with `.*`."""
    return unit.name if unit.layers == (unit.name,) else f"{unit.name}.*"
