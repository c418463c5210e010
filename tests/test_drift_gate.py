"""The drift gate's arithmetic on numbers known by hand: which value meets which limit, signs, steps and intervals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arcflow_export.drift import compare, engines, gate, sensitivity
from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.drift.compare_cases import CaseErrors, Quantity
from arcflow_export.drift.judged import Judged, Share, judge_images
from arcflow_export.drift.layers import LayerDrift, LayerErrors, _reach
from arcflow_export.drift.measures import gmsd, mean, psnr_db, relative_error, root_ratio
from arcflow_export.drift.report import DriftReport, Measure, shown_places
from arcflow_export.drift.sensitivity import Effect, Sensitivity, Unit
from arcflow_export.formats.thresholds import Thresholds, times
from arcflow_export.images import judge as judge_module
from arcflow_export.images.statistics import Interval


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def layer(name: str, errors: tuple[float, ...], reach: tuple[float, ...] | None = (1.0,), **more) -> LayerDrift:
    return LayerDrift("backbone", name, errors, reach, **({"scale": name} | more))


# Measures.


def test_relative_error_of_rows_by_hand():
    """Every row for itself: |(3, 4) - (0, 0)| / |(3, 4)| = 1, then 5 / 10 in all axes, then 0 of 0."""
    reference = np.array([[[3.0, 4.0]], [[6.0, 8.0]], [[0.0, 0.0]]])
    got = np.array([[[0.0, 0.0]], [[3.0, 4.0]], [[0.0, 0.0]]])
    assert relative_error(got, reference).tolist() == [1.0, 0.5, 0.0]
    # The reference is what is divided by: the other way round is twice as much.
    assert relative_error(reference[1:2], got[1:2]).tolist() == [1.0]
    assert relative_error(np.zeros((2, 0)), np.zeros((2, 0))).tolist() == [0.0, 0.0]


def test_a_difference_where_the_reference_is_zero_is_not_hidden():
    assert root_ratio(np.array([1.0, 0.0, np.inf]), np.array([0.0, 0.0, 4.0])).tolist() == [1e30, 0.0, np.inf]
    assert root_ratio(np.array([9.0]), np.array([4.0])).tolist() == [1.5]


def test_psnr_is_each_picture_s_own():
    """20 log10(255 / d) of a constant difference d, whichever side is brighter."""
    reference = np.full((3, 2, 2, 3), 100, np.uint8)
    got = reference.copy()
    got[1] -= 51
    got[2, 0] += 51  # half of the pixels: 10 log10(2) dB more
    expected = [100, 20 * math.log10(5), 20 * math.log10(5) + 10 * math.log10(2)]
    assert psnr_db(got, reference) == pytest.approx(expected)


def test_gmsd_by_hand():
    """A vertical edge of grey levels against nothing, by the definition of Xue et al. 2014.

    Halved in size the picture is 4 x 4, its two right columns 255 times 0.299 (only red is lit). The Prewitt gradient
    of a row-constant picture is the difference of the neighbours' columns: 0, d, d, 0 with d the edge, edges repeated.
    """
    lost, edge = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)
    edge[:, :, 4:, 0] = 255
    d = 0.299 * 255
    similarity = np.array([1, 170 / (d**2 + 170), 170 / (d**2 + 170), 1])
    assert gmsd(lost, edge) == pytest.approx([similarity.std()])
    assert gmsd(lost.swapaxes(1, 2), edge.swapaxes(1, 2)) == pytest.approx([similarity.std()])


def test_the_mean_of_prompts_has_its_value_between_its_ends():
    values = np.array([0.0, 0.0, 0.0, 1.0])
    found = mean(values)
    # Of 4 draws with replacement, none is the 1 in (3/4)^4 = 32 %, and four are in 0.4 %.
    assert (found.low, found.value) == (0.0, 0.25) and 0.25 < found.high <= 0.75
    assert mean(np.array([1.0, np.nan])).value == np.inf


# Limits.


def test_times_a_limit():
    assert (times(0.3, 0.2), times(0.3, None), times(0.3, 0.0), times(0.0, 0.0)) == (
        pytest.approx(1.5),
        0.0,
        math.inf,
        0.0,
    )


def test_each_threshold_meets_its_own_measure():
    """Ten measures with ten values: the breach of each threshold names the right one."""

    def measure(group: str, what: str, value: float, step: int | None = None) -> Measure:
        return Measure(group, what, "", exactly(value), step)

    measures = [
        measure("parts", "text states", 0.91),
        measure("parts", "modulation", 0.92),
        measure("parts", "means", 0.21, 0),
        measure("parts", "logweights", 0.93, 0),
        measure("parts", "means", 0.22, 1),
        measure("parts", "loggammas", 0.94, 1),
        measure("end to end", "latents", 0.41, 0),
        measure("end to end", "latents", 0.31, 1),
        measure("parts", "VAE image", 0.95),
        measure("end to end", "PSNR", 24.0),
        measure("end to end", "GMSD", 0.96),
    ]
    limits = Thresholds(heads=0.1, latents=0.1, psnr=30.0, judge=0.1)
    lost = Judged(Share(exactly(0.9), exactly(0.7), exactly(-0.2)), Share(exactly(0.8), exactly(0.75), exactly(-0.05)))
    breaches = compare._breaches(measures, [layer("x", (0.1, 0.25))], lost, limits)
    assert {b.threshold: b.value for b in breaches} == {
        "layers": 0.25,
        "heads": 0.22,
        "latents": 0.31,
        "judge": 0.2,
        "psnr": 24.0,
    }
    assert "at step 1" in next(b.what for b in breaches if b.threshold == "heads")
    # Between the two steps' errors of the latents only the last one counts: 0.41 is no breach of 0.35.
    assert not compare._breaches(measures, [], None, Thresholds(latents=0.35))
    assert [b.value for b in compare._breaches(measures, [], None, Thresholds(latents=0.3))] == [0.31]
    swapped = [dataclasses.replace(m, step=1 - m.step) if m.what == "means" else m for m in measures]
    swapped.sort(key=lambda m: m.step or 0)
    (heads,) = compare._breaches(swapped, [], None, Thresholds(heads=0.1))
    assert heads.value == 0.22 and "at step 0" in heads.what


@pytest.mark.parametrize("value", [0.2, 0.2000001])
def test_a_limit_may_be_reached_and_not_passed(value):
    limits = Thresholds(heads=0.2, latents=0.2, psnr=30, judge=0.2, layers=0.2, headroom=5)
    past = value > 0.2
    worst = layer("x", (value,), (0.2 if not past else 0.1999999,))
    found = gate.check(
        limits, [worst], [exactly(value)], exactly(value), exactly(30 if not past else 29.9999), exactly(value)
    )
    names = ["layers", "headroom", "heads", "latents", "judge", "psnr"]
    assert [b.threshold for b in found] == (names if past else [])


@pytest.mark.parametrize("errors", [(0.03, 0.5), (0.5, 0.03), (0.03, 0.5, 0.1)])
def test_a_layer_s_error_is_that_of_its_worst_step(errors):
    d = layer("x", errors)
    assert d.error == 0.5 and d.badness(Thresholds()) == pytest.approx(2.5)
    (breach,) = gate.check(Thresholds(), [d], [exactly(0)], exactly(0), exactly(50), None)
    assert (breach.layer, breach.value) == ("x", 0.5)


@pytest.mark.parametrize("reach", [(0.01, 0.1), (0.1, 0.01)])
def test_headroom_is_that_of_the_largest_input(reach):
    d = layer("x", (0.01, 0.01), reach)
    assert d.headroom == pytest.approx(10)
    assert d.badness(Thresholds()) == pytest.approx(10 / 8)
    assert d.scale_at_fault(Thresholds()) and not d.scale_at_fault(Thresholds(headroom=11))
    (breach,) = gate.check(Thresholds(), [d], [exactly(0)], exactly(0), exactly(50), None)
    assert (breach.threshold, breach.value, breach.limit) == ("headroom", pytest.approx(10), 8)
    assert breach.hint == "its input scale can hold 10 times its largest input: the scale is too large"


@pytest.mark.parametrize(
    ("reach", "fault", "reason"),
    [
        ((0.1, 3.0), True, "its largest input is 3 times what its input scale can hold: the scale is too small"),
        ((1.5, 0.1), False, "its largest input is 1.5 times what its input scale can hold: it is clipped"),
        ((1.005, 0.1), False, "its largest input is 1 of what its input scale can hold: look at the weight's scale"),
        ((0.3, 0.1), False, "its largest input is 0.3 of what its input scale can hold: look at the weight's scale"),
        ((0.2, 0.1), False, "its input scale can hold 5 times its largest input: the scale is too large"),
        ((0.0, 0.0), False, ""),
        (None, False, ""),
    ],
)
def test_what_the_reach_of_a_scale_says(reach, fault, reason):
    d = layer("x", (0.1, 0.1), reach)
    assert (d.scale_at_fault(Thresholds()), d.reason()) == (fault, reason)


def test_reach_is_the_largest_input_over_what_the_scale_holds():
    assert _reach([896.0, 112.0], 2.0) == (1.0, 0.125)
    assert _reach([1.0], 0.0) == (math.inf,) and _reach([1.0], None) is None


def test_layers_are_ranked_by_how_far_past_a_limit_then_by_error():
    layers = [
        layer("within", (0.05,)),
        layer("larger within", (0.1,)),
        layer("far", (0.8,)),
        layer("headroom", (0.01,), (0.05,)),
        layer("near", (0.22,)),
    ]
    # 0.8 / 0.2 = 4 times; 20 / 8 = 2.5 times; 1.1 times; then those within by error.
    ranked = [d.layer for d in gate.ranked(layers, Thresholds())]
    assert ranked == ["far", "headroom", "near", "larger within", "within"]


def test_an_interval_that_includes_the_limit_may_be_chance():
    """The near end counts: the lower one of an error, the upper one of the PSNR."""

    def hints(error: Interval, psnr: Interval) -> list[bool]:
        limits = Thresholds(heads=0.1, latents=0.1, judge=0.1, psnr=30)
        return [bool(b.hint) for b in gate.check(limits, [], [error], error, psnr, error)]

    assert hints(Interval(0.2, 0.1, 0.3), Interval(29, 28, 30)) == [True] * 4
    assert hints(Interval(0.2, 0.11, 0.3), Interval(29, 28, 29.9)) == [False] * 4


# More cases and steps.


def test_errors_of_more_inputs_are_joined_step_by_step():
    one = LayerErrors({"a": [np.array([1.0]), np.array([2.0])]}, {"a": [5.0, 6.0]})
    one.extend(LayerErrors({"a": [np.array([3.0, 4.0]), np.array([5.0, 6.0])]}, {"a": [4.0, 7.0]}))
    assert [step.tolist() for step in one.errors["a"]] == [[1.0, 3.0, 4.0], [2.0, 5.0, 6.0]]
    assert one.largest["a"] == [5.0, 7.0]


def test_cases_that_are_compared_apart_are_joined_in_order():
    def found(value: int, count: int) -> CaseErrors:
        pictures = np.full((count, 1, 1, 3), value, np.uint8)
        layers = LayerErrors({"a": [np.full(count, float(value))]}, {"a": [float(value)]})
        return CaseErrors({Quantity("parts", "q", ""): np.full(count, value)}, {"p": layers}, pictures, pictures + 1)

    joined = compare._joined(found(1, 2), found(5, 1))
    assert [v.tolist() for v in joined.values.values()] == [[1, 1, 5]]
    assert joined.reference[:, 0, 0, 0].tolist() == [1, 1, 5] and joined.candidate[:, 0, 0, 0].tolist() == [2, 2, 6]
    assert joined.layers["p"].errors["a"][0].tolist() == [1.0, 1.0, 5.0] and joined.layers["p"].largest["a"] == [5.0]


def test_the_cases_that_are_shown_are_spread_over_all():
    assert shown_places(3) == [0, 1, 2] and shown_places(8) == list(range(8))
    assert shown_places(9) == [0, 2, 4, 6, 8] and shown_places(17) == [0, 3, 6, 9, 12, 15]


# Sensitivity.


@pytest.mark.parametrize(
    ("effect", "limits", "times_over"),
    [
        (Effect(0.2, 0.1), Thresholds(heads=0.1, latents=0.1), 2),
        (Effect(0.1, 0.2), Thresholds(heads=0.1, latents=0.1), 2),
        (Effect(0.2, 0.1), Thresholds(latents=0.2), 0.5),
        (Effect(0.0, 0.0, 20.0), Thresholds(psnr=26), 10**0.3),
        (Effect(0.0, 0.0, 32.0), Thresholds(psnr=26), 10**-0.3),
        (Effect(0.3, 0.0, 20.0), Thresholds(heads=0.1, psnr=26), 3),
        (Effect(0.1, 0.0, 20.0), Thresholds(heads=0.1), 1),
        (Effect(0.1, 0.0), Thresholds(heads=0.1, psnr=26), 1),
        (Effect(9.0, 9.0, 0.0), Thresholds(), 0),
    ],
)
def test_how_far_an_effect_is_past_the_limits(effect, limits, times_over):
    """6 dB less than asked are an RMS error 10^(6/20) times too large."""
    assert effect.over(limits) == pytest.approx(times_over)


@pytest.mark.parametrize("means", [(0.1, 0.3), (0.3, 0.1)])
def test_an_effect_is_of_the_worst_step_and_the_last_latents(means, monkeypatch):
    """Heads of error `means` at the two steps, on the reference's inputs; latents that are half of the reference's."""
    ones = np.ones((2, 1, 4), np.float32)
    stages = SimpleNamespace(sigmas=[1.0, 0.5, 0.0], decode=lambda x: np.full((2, 1, 1, 3), 0, np.uint8))
    latents = [ones, 2 * ones, 8 * ones]
    trajectory = SimpleNamespace(latents=latents, heads=[{"means": ones}, {"means": ones}])
    asked = []

    def predict(run, step, sets):
        asked.append([float(x[0, 0, 0]) for _, x in sets])
        return [{"means": ones * (1 + means[step])}, {"means": 0 * ones}][: len(sets)]

    monkeypatch.setattr(sensitivity, "predict", predict)
    monkeypatch.setattr(sensitivity, "advance", lambda x, heads, sigma, sigma_next: x + 3 * (sigma - sigma_next))
    monkeypatch.setattr(sensitivity, "load_graph", lambda *_: None)
    monkeypatch.setattr(sensitivity, "leave_out", lambda *_: None)
    monkeypatch.setattr(sensitivity, "linears", lambda _: {})
    monkeypatch.setattr(sensitivity, "quantized_layers", lambda _: ["a", "b"])
    monkeypatch.setattr(sensitivity, "BlockEngine", lambda *_: SimpleNamespace(run_all=None, close=lambda: None))
    experiment = sensitivity._Experiment(None, None, stages, [], trajectory)
    effect = experiment.run(["a"], images=True)
    # From 1 in two steps of 1.5 each to 4, half of 8; at the second step its own latents are asked for too.
    assert asked == [[1.0], [2.0, 2.5]]
    assert (effect.heads, effect.latents, effect.psnr) == (pytest.approx(0.3), pytest.approx(0.5), 100)
    assert experiment.run(["a"]).psnr is None


# Engines.


def test_engines_draw_each_case_with_its_own_seed_and_the_scene(monkeypatch):
    """Latents come back by step and then by case, images by case."""
    asked, scene = [], ImageSettings(32, 48, 2, 2.5, 12)

    class Fake:
        @staticmethod
        def load(root: Path, backend: str):
            asked.append((root, backend))
            return Fake()

        def __call__(self, prompt, height, width, steps, guidance, seed, *, max_sequence_length, callback_on_step_end):
            asked.append((prompt, height, width, steps, guidance, seed, max_sequence_length))
            latents = np.zeros((1, 1, 4), np.float32)
            for step in range(steps):
                latents[:] = seed + step / 10  # in place, as the runtime may reuse its memory
                callback_on_step_end(step, latents)
            return SimpleNamespace(images=[np.full((1, 1, 3), seed, np.uint8)])

    monkeypatch.setattr(engines, "Pipeline", Fake)
    opened = engines.Engines(SimpleNamespace(root=Path("bundle")), "tensorrt", scene)
    steps, images = opened.generate([DriftCase("a", 7), DriftCase("b", 3)])
    assert asked == [(Path("bundle"), "tensorrt"), ("a", 32, 48, 2, 2.5, 7, 12), ("b", 32, 48, 2, 2.5, 3, 12)]
    assert [x[:, 0, 0].tolist() for x in steps] == [pytest.approx([7, 3]), pytest.approx([7.1, 3.1])]
    assert images[:, 0, 0, 0].tolist() == [7, 3]


# The judge.


def test_the_drop_is_the_larger_loss_with_its_interval_the_right_way_round():
    small, large = Interval(-0.01, -0.02, 0.01), Interval(-0.2, -0.3, -0.1)
    shares = [Share(exactly(0.9), exactly(0.9), d) for d in (small, large)]
    for judged in (Judged(*shares), Judged(*reversed(shares))):
        assert judged.drop == Interval(0.2, 0.1, 0.3)
    gain = Share(exactly(0.5), exactly(0.6), Interval(0.1, 0.05, 0.2))
    assert Judged(gain, gain).drop == Interval(-0.1, -0.2, -0.05)


def test_shares_of_the_judge_by_hand(monkeypatch):
    """Four pictures named by their shade: reference right 4 of 4, candidate named 3 and clean 2 of these."""
    clean = {10: 0.9, 20: 0.9, 30: 0.1, 40: 0.9}

    class Fake:
        @staticmethod
        def load(folder: Path):
            return Fake()

        def read(self, pictures: torch.Tensor):
            shades = [round(float(p[0, 0, 0]) * 255) for p in pictures]
            color = torch.tensor([0 if s != 40 else 1 for s in shades])
            clean_of = torch.tensor([clean[s] for s in shades])
            return judge_module.Reading({"color": color}, clean_of, torch.zeros(len(shades), 1))

    monkeypatch.setattr(judge_module, "Judge", Fake)
    first = next(iter(judge_module.ATTRIBUTES["color"]))
    cases = [DriftCase("x", i, {"color": first}) for i in range(4)]
    reference = np.full((4, 2, 2, 3), 10, np.uint8)
    candidate = np.stack([np.full((2, 2, 3), s, np.uint8) for s in (10, 20, 30, 40)])
    judged = judge_images(Path("judge"), cases, reference, candidate)
    values = [(s.reference.value, s.candidate.value, s.difference.value) for s in (judged.named, judged.right)]
    assert values == [(1.0, 0.75, -0.25), (1.0, 0.5, -0.5)]
    assert judged.drop.value == 0.5 and judged.drop.low <= 0.5 <= judged.drop.high


# The report.


def report(**changes) -> DriftReport:
    settings = {"candidate": "c", "reference": "r", "count": 2, "prompts": "p", "seed": 0, "policy": "q"}
    settings |= {"width_px": 64, "height_px": 32, "num_inference_steps": 2}
    settings |= {"negative_prompt": None, "true_cfg_scale": 1.0}
    latents = [Measure("end to end", "latents", "", exactly(v), s) for s, v in enumerate((0.4, 0.3))]
    means = [Measure("parts", "means", "", exactly(0.1), s) for s in (0, 1)]
    psnr = Measure("end to end", "PSNR", "dB", exactly(30.0))
    values = {"settings": settings, "versions": {}, "notes": (), "thresholds": Thresholds(heads=0.25, latents=0.35)}
    values |= {"measures": (*means, *latents, psnr), "judged": None, "layers": (), "sensitivity": None, "breaches": ()}
    return DriftReport(**(values | changes))


def test_the_table_puts_each_limit_beside_what_it_limits():
    lines = {line.split("|")[2].strip(): line for line in report().text().splitlines() if line.startswith("| ")}
    assert lines["step 1 latents"].endswith("<= 0.35 |") and "0.35" not in lines["step 0 latents"]
    assert all(lines[f"step {s} means"].endswith("<= 0.25 |") for s in (0, 1))
    text = report().text()
    assert "2 prompts (p), 64x32, 2 steps, seeds from 0, thresholds of the policy q" in text


def test_what_is_left_out_is_what_was_found():
    failed = (gate.Breach("heads", "x", 1.0, 0.1),)
    bad, good = layer("bad", (0.5,)), layer("good", (0.01,))
    found = Sensitivity("layers", 2, Effect(1, 1), Effect(0, 0), (), ("u.*", "v"))
    units = (Unit("u", ("u.a",), Effect(1, 1), Effect(0, 0)),)
    assert report(breaches=(), layers=(bad,)).exclude() == ({}, "")
    wanted = dataclasses.replace(found, units=units)
    assert report(breaches=failed, sensitivity=wanted, layers=(bad,)).exclude()[0] == {"backbone": ("u.*", "v")}
    assert report(breaches=failed, layers=(good, bad)).exclude()[0] == {"backbone": ("bad",)}
    none = dataclasses.replace(found, exclude=None)
    assert report(breaches=failed, sensitivity=none, layers=(good,)).exclude() == (
        {},
        "leaving out layers does not help: the error is in the arithmetic or in another part",
    )
    empty = dataclasses.replace(found, exclude=())
    assert "with the reference's text" in report(breaches=failed, sensitivity=empty, layers=(good,)).exclude()[1]
    several = [layer(n, (e,)) for n, e in (("a", 0.01), ("b", 0.04), ("c", 0.03), ("d", 0.02))]
    assert report(breaches=failed, layers=tuple(several)).exclude()[0] == {"backbone": ("b", "c", "d")}
