"""Scores, statistics and pairings of an evaluation on numbers known by hand; no network is run but a tiny teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from arcflow_distill.evaluate import paths
from arcflow_distill.evaluate.options import EvaluationOptions
from arcflow_distill.evaluate.report import EvaluationReport, SamplerReport
from arcflow_distill.evaluate.samplers import EulerSampler, Generated, TeacherPipeline, generate_all, noise, to_uint8
from arcflow_distill.evaluate.scores import Difference, Score, Scorer
from arcflow_distill.evaluate.students import AdapterSampler, BundleSampler, Call
from arcflow_distill.train.networks import Canvas, TeacherNetwork, load_transformer
from arcflow_distill.train.prompts import Encoder, collate
from arcflow_export.images.cases import Cases, _described, draw_cases, real_images
from arcflow_export.images.judge import Judge, Reading, judge_rates, to_tensor
from arcflow_export.images.scenes import ATTRIBUTES, BACKGROUNDS, COLORS, PHRASES, sample
from arcflow_export.images.statistics import Interval, frechet, mean_interval, moments, normal_interval, resample
from arcflow_runtime.errors import RequestError
from tests.checkpoints import GOLDEN

FLUX = GOLDEN / "flux-tiny"
#: Two prompts of each group, which name these words.
CASES = Cases(
    ({"color": "red"}, {"shape": "heart"}, {"color": "blue", "shape": "heart"}, {}),
    ("a red shape", "a heart", "a blue heart", "a shape"),
    ("seen", "seen", "held-out", "held-out"),
    (5, 6, 7, 8),
)


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


# Statistics.


def test_an_interval_is_the_percentiles_of_the_resampled_means():
    """Means 0, 5 and 10 of the draws: 2.5 % of the way is 0.5 / 10 of the first gap of 5."""
    found = mean_interval(np.array([0.0, 10.0]), np.array([[1, 1], [0, 0], [0, 1]]))
    assert (found.low, found.value, found.high) == pytest.approx((0.25, 5.0, 9.75))


def test_an_interval_by_the_standard_error():
    """Replicates 1 and 3 have the sample deviation sqrt(2); 1.959964 of it on either side."""
    found = normal_interval(7.0, np.array([1.0, 3.0]))
    assert found.value == 7.0
    assert (found.high - 7.0, 7.0 - found.low) == pytest.approx([1.959964 * math.sqrt(2)] * 2)


def test_resampling_draws_every_place_alike():
    draws = resample(4, 3000, seed=1)
    assert draws.shape == (3000, 4) and np.array_equal(draws, resample(4, 3000, seed=1))
    assert not np.array_equal(draws, resample(4, 3000, seed=2))
    shares = np.bincount(draws.ravel(), minlength=4) / draws.size
    # Four standard deviations of a share of a quarter of 12,000.
    assert np.abs(shares - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / 12000)


def test_moments_and_distance_by_hand():
    """Of 0, 2 and 4: mean 2 and sample variance 4. One dimension: (2 - 3)^2 + (2 - 3)^2."""
    mean, covariance = moments(np.array([[0.0], [2.0], [4.0]]))
    assert mean.tolist() == [2.0] and covariance.tolist() == [[4.0]]
    assert frechet(mean, covariance, np.array([3.0]), np.array([[9.0]])) == pytest.approx(2.0)


# Scores.


class FakeJudge:
    """Reads a picture by its first pixel: red and green are the colour's and shape's index, blue is over 100 if clean.

    Two features are the red and green of the second pixel.
    """

    def read(self, pictures: torch.Tensor) -> Reading:
        levels = (pictures * 255).round().long()
        first, second = levels[:, :, 0, 0], levels[:, :, 0, 1]
        clean = torch.where(first[:, 2] > 100, 0.9, 0.1)
        return Reading({"color": first[:, 0], "shape": first[:, 1]}, clean, second[:, :2].float())


def picture(words: dict[str, str], clean: bool, feature: int, shade: int) -> np.ndarray:
    found = np.full((2, 2, 3), shade, np.uint8)
    found[0, 0] = [ATTRIBUTES[a].index(words.get(a, ATTRIBUTES[a][0])) for a in ("color", "shape")] + [200 * clean]
    found[0, 1] = [feature, 7, 0]
    return found


def drawn(latents: list[float], features: list[int], wrong: tuple[int, ...] = (), unclean: tuple[int, ...] = ()):
    """Latents of one value each and pictures that show what was named, but for some."""
    pictures = []
    for i, words in enumerate(CASES.words):
        shown = {
            name: ATTRIBUTES[name][-1 - ATTRIBUTES[name].index(w)] if i in wrong else w for name, w in words.items()
        }
        pictures.append(picture(shown, i not in unclean, features[i], 10))
    return Generated(np.array(latents, np.float32).reshape(4, 1, 1), np.stack(pictures))


@pytest.fixture
def scorer():
    """Reference latents 0, 0, 4, 4 of variance 4; real features 0, 2, 0, 2 of variance 1."""
    reference = drawn([0, 0, 4, 4], [0, 2, 0, 2])
    real = to_tensor(np.stack([picture({}, True, f, 0) for f in (0, 2, 0, 2)]))
    return Scorer(CASES, FakeJudge(), real, reference, seed=0), reference


def test_shares_by_group(scorer):
    """The red one is wrong, one of the clean is not: 3 of 4 named, 2 of 4 right."""
    scores = scorer[0].score("s", drawn([0] * 4, [0, 2, 0, 2], wrong=(0,), unclean=(0, 2)))
    assert {g: s.named.value for g, s in scores.items()} == {"all": 0.75, "seen": 0.5, "held-out": 1.0}
    assert {g: s.right.value for g, s in scores.items()} == {"all": 0.5, "seen": 0.5, "held-out": 0.5}


def test_errors_are_from_the_reference_and_relative_to_its_variance(scorer):
    """Latents off by 2, 0, 0 and 4: squares 4, 0, 0, 16, of the variance 4 over all prompts."""
    scores = scorer[0].score("s", drawn([2, 0, 4, 0], [0, 2, 0, 2]))
    assert {g: s.latent_error.value for g, s in scores.items()} == {"all": 5.0, "seen": 2.0, "held-out": 8.0}
    relative = {g: s.latent_error_relative.value for g, s in scores.items()}
    assert relative == {"all": 1.25, "seen": 0.5, "held-out": 2.0}
    assert all(s.psnr_db.value == 100 for s in scores.values())
    for s in scores.values():
        for interval in dataclasses.asdict(s).values():
            assert interval["low"] <= interval["value"] <= interval["high"]


def test_the_psnr_is_a_mean_of_decibels(scorer):
    """One of four pictures differs, by 30 in all 3 channels of one of 4 pixels: mean square (30 / 255)^2 / 4."""
    other = drawn([0, 0, 4, 4], [0, 2, 0, 2])
    other.images[1, 1, 1] += 30
    one = -10 * math.log10((30 / 255) ** 2 / 4)
    scores = scorer[0].score("s", other)
    assert scores["seen"].psnr_db.value == pytest.approx((100 + one) / 2)
    assert scores["all"].psnr_db.value == pytest.approx((300 + one) / 4)
    assert scores["held-out"].psnr_db.value == 100


def test_the_distance_of_features_is_in_units_of_the_real_ones(scorer):
    """Real 0, 2, 0, 2 and pictures 3, 5, 3, 5 have the same spread: 3^2, of the real features' variance 1."""
    scores = scorer[0].score("s", drawn([0] * 4, [3, 5, 3, 5]))
    assert {g: s.frechet.value for g, s in scores.items()} == pytest.approx({"all": 9, "seen": 9, "held-out": 9})
    wide = Scorer(
        CASES,
        FakeJudge(),
        to_tensor(np.stack([picture({}, True, f, 0) for f in (0, 4, 0, 4)])),
        scorer[1],
        seed=0,
    )
    # Means 2 and 6 apart by 4, deviations alike; in units of the variance 4.
    assert wide.score("s", drawn([0] * 4, [4, 8, 4, 8]))["all"].frechet.value == pytest.approx(4)


def test_resampled_pictures_are_paired_with_the_real_ones_of_their_prompts():
    """Features equal to the real ones, which differ from prompt to prompt: no resample of any group has a distance."""
    features = [0, 2, 10, 30]
    real = to_tensor(np.stack([picture({}, True, f, 0) for f in features]))
    scores = Scorer(CASES, FakeJudge(), real, drawn([0, 0, 4, 4], features), 0).score("s", drawn([0] * 4, features))
    for score in scores.values():
        # A variance of about 1 that should vanish is rounded by 2^-52; after its root 1e-8, a few times over.
        assert dataclasses.astuple(score.frechet) == pytest.approx((0, 0, 0), abs=1e-6)


def test_the_reference_and_real_pictures_have_no_errors(scorer):
    scores = scorer[0].score("reference", scorer[1])
    assert all((s.psnr_db, s.latent_error, s.latent_error_relative) == (None, None, None) for s in scores.values())
    assert scores["all"].frechet.value == pytest.approx(0, abs=1e-6)
    real = scorer[0].score_real(to_tensor(np.stack([picture({}, True, f, 0) for f in (1, 3, 1, 3)])))
    assert real["all"].psnr_db is None and real["all"].frechet.value == pytest.approx(1)
    # The word "red" is the first, which these show; no heart is.
    assert real["all"].named.value == 0.5


def test_a_sampler_minus_itself_is_nothing(scorer):
    scorer[0].score("a", drawn([2, 0, 4, 0], [3, 9, 1, 2]))
    for group in ("all", "seen", "held-out"):
        found = scorer[0].difference("a", "a", group)
        assert (found.latent_error_relative, found.frechet) == (exactly(0), exactly(0))


def test_a_difference_is_student_minus_baseline_and_paired(scorer):
    """Relative errors 1, 0, 0, 4 and 2, 1, 1, 5: one less each, whatever prompts are drawn."""
    scorer[0].score("student", drawn([2, 0, 4, 0], [0, 2, 0, 2]))
    scorer[0].score("baseline", drawn([8**0.5, 2, 6, 4 - 20**0.5], [3, 5, 3, 5]))
    found = scorer[0].difference("student", "baseline", "all")
    error = found.latent_error_relative
    assert (error.value, error.low, error.high) == pytest.approx((-1, -1, -1), abs=1e-6)
    assert (found.student, found.baseline, found.group) == ("student", "baseline", "all")
    assert found.frechet.value == pytest.approx(-9)
    assert found.frechet.low <= found.frechet.value <= found.frechet.high
    other = scorer[0].difference("baseline", "student", "seen")
    assert (other.latent_error_relative.value, other.frechet.value) == pytest.approx((1, 9))


def test_tensors_of_pictures_by_hand():
    pictures = np.zeros((1, 2, 3, 3), np.uint8)
    pictures[0, 1, 2, 0] = 255
    tensor = to_tensor(pictures)
    assert tensor.shape == (1, 3, 2, 3) and float(tensor[0, 0, 1, 2]) == 1 and float(tensor.sum()) == 1
    assert to_uint8(np.array([0.0, 0.4999 / 255, 0.5001 / 255, 1.0])).tolist() == [0, 0, 1, 255]


# Prompts.


@pytest.mark.parametrize(("count", "held_out"), [(5, 2), (8, 4)])
def test_the_last_half_is_held_out_and_captions_name_their_words(count, held_out):
    cases = draw_cases(count, seed=3)
    assert cases.groups == ("seen",) * (count - held_out) + ("held-out",) * held_out
    assert cases.rows("all") == list(range(count)) and len(cases) == len(cases.captions) == count
    assert cases.rows("held-out") == list(range(count - held_out, count))
    for words, caption in zip(cases.words, cases.captions, strict=True):
        said = dict(words)
        if "position" in said:
            assert PHRASES[said.pop("position")] in caption
        assert all(word in caption.split(" ", 1)[1] for word in said.values())
    assert all({"shape", "color"} <= w.keys() for w in cases.words[-held_out:])


def test_both_ways_of_naming_a_background_are_used():
    captions = [
        c for c, w in zip(*(lambda d: (d.captions, d.words))(draw_cases(60, 0)), strict=True) if "background" in w
    ]
    assert any(" on a " in c for c in captions) and any(", " in c for c in captions)


def test_real_pictures_are_of_the_words():
    """The corner has the named background, and some pixel the named colour."""
    cases = draw_cases(32, seed=2)
    pictures = real_images(cases, seed=1)
    for words, shown in zip(cases.words, pictures, strict=True):
        if "background" in words:
            assert torch.allclose(shown[:, 0, 0] * 255, torch.tensor(BACKGROUNDS[words["background"]]).float())
        if "color" in words:
            away = (shown * 255 - torch.tensor(COLORS[words["color"]])[:, None, None]).abs().amax(0)
            assert away.min() < 0.01
    assert not torch.equal(pictures, real_images(cases, seed=2))


def test_scenes_that_fit_have_every_word():
    scenes = sample(400, torch.Generator().manual_seed(0))
    rows = _described(scenes, {"size": "large", "position": "left"}).tolist()
    wanted = [i for i in range(400) if scenes.words(i)["size"] == "large" and scenes.words(i)["position"] == "left"]
    assert rows == wanted and 0 < len(rows) < 100
    assert len(_described(scenes, {})) == 400


# Samplers.


class Numbered:
    """A sampler whose latents are the seed, and whose pictures are the caption's length."""

    network_calls, batch = 1, 2

    def generate(self, captions, seeds):
        assert len(captions) == len(seeds) <= self.batch
        pictures = np.array([len(c) for c in captions], np.uint8).reshape(-1, 1, 1, 1)
        return Generated(np.array(seeds, np.float32).reshape(-1, 1, 1), pictures)


def test_batches_keep_captions_and_seeds_together():
    found = generate_all(Numbered(), ["a", "bb", "ccc", "dddd", "eeeee"], [9, 8, 7, 6, 5])
    assert found.latents.ravel().tolist() == [9, 8, 7, 6, 5] and found.pictures.ravel().tolist() == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def teacher() -> TeacherPipeline:
    return TeacherPipeline(FLUX / "base")


def test_two_euler_steps_by_hand(teacher):
    """x + (sigma' - sigma) v at 1 and 3.2/4.2, guidance 3.5 and 12 text tokens, with the distillation's own network."""
    captions, seeds = ("a red circle", "a shape"), (5, 6)
    path, _ = teacher.walk(captions, seeds, 2)
    network = TeacherNetwork(load_transformer(FLUX / "base", "flux", torch.float32), "flux")
    text = collate(Encoder(FLUX / "base", "flux", torch.float32, torch.device("cpu"), 12).encode(captions))
    x, sigmas = noise(seeds), (1.0, 3.2 / 4.2, 0.0)
    np.testing.assert_array_equal(path[0], x.numpy())
    for i in range(2):
        x = x + (sigmas[i + 1] - sigmas[i]) * network(x, torch.full([2], sigmas[i]), text, Canvas(4, 4, 3.5))
        # The two code paths round the timestep and the rotary tables alike; sums of float32 differ by their order.
        np.testing.assert_allclose(path[i + 1], x.numpy(), atol=1e-4)
    assert not np.allclose(path[1, 0], path[1, 1])
    last = EulerSampler(teacher, 2).generate(captions, seeds)
    np.testing.assert_array_equal(last.latents, path[2])


def test_a_bundle_shows_what_its_adapter_predicts(bundles):
    """Every field of every call: the latents that it got, the three heads, and the sigmas of the step."""
    captions, seeds = ("a red circle", "two cats"), (5, 6)
    bundle, adapter = BundleSampler(bundles("flux-tiny")), AdapterSampler(FLUX / "base", FLUX / "adapter")
    ours, theirs = bundle.calls(captions, seeds), adapter.calls(captions, seeds)
    for calls in (ours, theirs):
        assert [c.sigma for c in calls] == pytest.approx([1.0, 3.2 / 4.2])
        assert [c.sigma_next for c in calls] == pytest.approx([3.2 / 4.2, 0.0])
    for a, b in zip(ours, theirs, strict=True):
        for field in ("latents", "means", "logweights", "loggammas"):
            got, wanted = getattr(a, field), getattr(b, field)
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, atol=1e-3 * max(1, np.abs(wanted).max()), err_msg=field)
    np.testing.assert_allclose(theirs[0].latents, noise(seeds).numpy())
    assert not np.allclose(theirs[1].latents, theirs[0].latents, atol=0.1)


# Paths.


def test_an_arc_of_a_constant_velocity_is_straight():
    """One mode of mean 2: x falls by 2 for each unit of sigma, in equal steps."""
    ones = np.ones((1, 1, 4), np.float32)
    call = Call(ones, 2 * ones[:, :, None], np.zeros((1, 1, 1, 4), "f4"), np.zeros((1, 1, 0, 4), "f4"), 0.8, 0.3)
    points = paths.arc(call, 6)
    assert points[:, 0, 0, 0] == pytest.approx([1 - 2 * 0.1 * i for i in range(6)], abs=1e-6)


def test_walks_are_of_seen_prompts_that_name_little():
    """Each part of a walk comes from its own prompt: latents and pictures are numbered by the prompt's seed."""
    words = [{"a": 1, "b": 2}, {"a": 1}, {}, {"a": 1}, {"a": 1}, {}]
    groups = ("seen", "seen", "held-out", "seen", "seen", "seen")
    cases = Cases(tuple(words), tuple("abcdef"), groups, tuple(range(10, 16)))
    asked = []

    def numbered(seeds, points, add):
        return np.array([[[[s + add + p / 100]] for s in seeds] for p in range(points)])

    def walk(captions, seeds, steps):
        asked.append((captions, seeds, steps))
        return numbered(seeds, steps + 1, 0), np.array(seeds) + steps

    zeros = np.zeros((4, 1, 1, 4), np.float32)

    def calls(captions, seeds):
        x = np.array(seeds, np.float32).reshape(-1, 1, 1).repeat(4, 2)
        return [Call(x + step, zeros, zeros, zeros[:, :, :0], 1.0 - step / 2, 0.5 - step / 2) for step in range(2)]

    student = SimpleNamespace(calls=calls, network_calls=2)
    drawing = Generated(np.zeros((6, 1, 1)), np.arange(20, 26))
    walks = paths.walk(cases, SimpleNamespace(walk=walk), student, drawing, 50)
    assert [w.caption for w in walks] == ["f", "b", "d", "e"]
    assert asked == [(["f", "b", "d", "e"], [15, 11, 13, 14], 50), (["f", "b", "d", "e"], [15, 11, 13, 14], 2)]
    for w, seed in zip(walks, (15, 11, 13, 14), strict=True):
        assert w.teacher.shape == (51, 1) and w.teacher[0] == seed and w.chord.shape == (3, 1)
        assert [arc[0, 0] for arc in w.student] == [seed, seed + 1]
        assert w.pictures == {"teacher": seed + 50, "student": seed + 10, "chord": seed + 2}


def test_the_plane_is_that_of_the_largest_spread():
    points = np.array([[5.0, 0, 0], [-5.0, 0, 0], [0, 0, 2.0], [0, 0, -2.0], [0, 0.1, 0], [0, -0.1, 0]]) + 7
    center, plane = paths.principal_plane(points)
    assert center.tolist() == pytest.approx([7, 7, 7])
    assert np.abs(plane) == pytest.approx(np.array([[1, 0, 0], [0, 0, 1]]), abs=1e-12)


# Options and tables.


@pytest.mark.parametrize("bad", [{"count": 3}, {"seed": 2**32}, {"teacher_steps": (1001,)}, {"teacher_steps": (2, 0)}])
def test_options_at_their_ends(bad):
    EvaluationOptions(count=4, seed=2**32 - 1, teacher_steps=(1000, 1))
    with pytest.raises(RequestError):
        EvaluationOptions(**bad)


def test_the_table_has_every_number_in_its_place():
    def score(start: float, errors: bool) -> Score:
        values = [Interval(start + i / 10, start + i / 10 - 0.01, start + i / 10 + 0.02) for i in range(6)]
        return Score(*values) if errors else Score(*values[:3])

    groups = {"all": 1.0, "seen": 2.0, "held-out": 3.0}
    samplers = (
        SamplerReport("real", "real", 0, {g: score(s, False) for g, s in groups.items()}),
        SamplerReport("x", "X, 2 steps", 2, {g: score(s + 3, True) for g, s in groups.items()}),
    )
    difference = Difference("x", "real", "seen", Interval(-0.5, -0.6, -0.4), Interval(0.25, 0.2, 0.3))
    settings = {"prompts": {"seen": 3, "held-out": 2}, "teacher_steps": [50, 2]}
    report = EvaluationReport(settings, {}, {}, samplers, (difference,))
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in report.table().splitlines() if line.startswith("| ")]
    real, x = ([r for r in rows if r[0] == label] for label in ("real", "X, 2 steps"))
    assert [r[2] for r in real] == ["100.0 [99.0, 102.0]", "200.0 [199.0, 202.0]", "300.0 [299.0, 302.0]"]
    assert real[0][1] == real[0][4] == real[0][5] == "" and real[0][6] == "1.2000 [1.1900, 1.2200]"
    assert x[0] == [
        "X, 2 steps",
        "2",
        "400.0 [399.0, 402.0]",
        "410.0 [409.0, 412.0]",
        "4.3 [4.3, 4.3]",
        "4.5000 [4.4900, 4.5200]",
        "4.2000 [4.1900, 4.2200]",
    ]
    assert rows[-1] == ["X, 2 steps - real", "seen", "-0.5000 [-0.6000, -0.4000]", "0.2500 [0.2000, 0.3000]"]
    assert "3 and 2 prompts" in report.table() and "the teacher's 50 steps" in report.table()
    assert json.loads(json.dumps(report.as_json()))["differences"][0]["group"] == "seen"


# The judge.


def test_rates_of_a_judge_that_is_always_or_never_content(monkeypatch):
    """It reads every word rightly but the size, and calls all pictures clean, then none."""
    truth: list = []

    def known(count, generator, **kwargs):
        truth.append(sample(count, generator, **kwargs))
        return truth[-1]

    monkeypatch.setattr("arcflow_export.images.judge.sample", known)

    class AllClean:
        clean = 0.9

        def read(self, pictures):
            attributes = dict(truth[0].attributes)
            attributes["size"] = 1 - attributes["size"]
            return Reading(attributes, torch.full([len(pictures)], self.clean), torch.zeros(len(pictures), 1))

    rates = judge_rates(AllClean(), 6, seed=0)
    assert rates["shape"] == rates["color"] == 1 and rates["size"] == 0
    assert rates["false reject"] == 0 and {v for k, v in rates.items() if k.startswith("false accept")} == {1.0}
    AllClean.clean = 0.5
    rates = judge_rates(AllClean(), 6, seed=0)
    assert rates["false reject"] == 1 and {v for k, v in rates.items() if k.startswith("false accept")} == {0.0}


def test_likeness_to_the_palette_by_hand():
    """The judge's input at a pixel of exactly one colour of the palette is 1 there; 0.1 away in one channel, e^-1/2."""
    judge, seen = Judge(), []
    judge.trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    pictures = torch.zeros(1, 3, 64, 64)
    red = torch.tensor(COLORS["red"]) / 255
    pictures[0, :, 0, 0], pictures[0, :, 0, 1] = red, red + torch.tensor([0.1, 0, 0])
    judge.read(pictures)
    place = 3 + list(COLORS).index("red")
    # Squares multiplied out in float32 and divided by 0.02: a few units of 2^-24 x 50.
    assert seen[0][0, place, 0, 0] == pytest.approx(1, abs=2e-5)
    assert seen[0][0, place, 0, 1] == pytest.approx(math.exp(-0.5), abs=2e-5)
    assert torch.allclose(seen[0][0, :3, 0, 0], 2 * red - 1)
