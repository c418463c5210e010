"""Evaluation of students on shapes: prompts, statistics, samplers and the command, on checkpoints of random numbers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from arcflow_distill.evaluate import paths, run
from arcflow_distill.evaluate.options import EvaluationOptions
from arcflow_distill.evaluate.samplers import EulerSampler, TeacherPipeline, generate_all
from arcflow_distill.evaluate.sheet import CAPTION, GAP, HEADING, MARGIN, TITLE, Section, contact_sheet
from arcflow_distill.evaluate.students import AdapterSampler, BundleSampler, Call
from arcflow_export.errors import SourceError
from arcflow_export.images.cases import draw_cases, real_images
from arcflow_export.images.judge import Judge
from arcflow_export.images.scenes import HELD_OUT
from arcflow_export.images.statistics import (
    frechet,
    frechet_replicates,
    mean_interval,
    moments,
    normal_interval,
    resample,
)
from arcflow_runtime import cli
from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.update import update
from tests.checkpoints import GOLDEN

FLUX = GOLDEN / "flux-tiny"
CAPTIONS, SEEDS = ("a red circle", "a blue square on the left", "a shape"), (5, 6, 7)


@pytest.fixture(scope="module")
def teacher() -> TeacherPipeline:
    return TeacherPipeline(FLUX / "base")


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    Judge().save(folder)
    return folder


def arguments(target, out, judge, *more) -> list[str]:
    named = [str(target), "--base", str(FLUX / "base"), "--out", str(out), "--judge", str(judge)]
    return ["eval", *named, "--count", "8", "--teacher-steps", "2", "3", *map(str, more)]


# Prompts.


def test_prompts_repeat_and_each_group_keeps_to_its_pairs():
    cases = draw_cases(60, seed=4)
    assert cases == draw_cases(60, seed=4) != draw_cases(60, seed=5)
    assert cases.seeds == tuple(range(4, 64)) and len(cases.rows("seen")) == len(cases.rows("held-out")) == 30
    pairs = {group: [cases.words[i] for i in cases.rows(group)] for group in ("seen", "held-out")}
    assert all((w["shape"], w["color"]) in HELD_OUT for w in pairs["held-out"])
    assert not any((w.get("shape"), w.get("color")) in HELD_OUT for w in pairs["seen"])
    assert len({len(w) for w in cases.words}) > 3


def test_real_images_show_what_the_captions_name():
    cases = draw_cases(24, seed=0)
    images = real_images(cases, seed=1)
    assert torch.equal(images, real_images(cases, seed=1)) and images.shape == (24, 3, 64, 64)
    left = [i for i, w in enumerate(cases.words) if w.get("position") == "left"]
    right = [i for i, w in enumerate(cases.words) if w.get("position") == "right"]
    for rows, half in ((left, slice(46, 64)), (right, slice(0, 18))):
        assert rows and images[rows][..., half].flatten(2).std(2).max() < 1e-6  # plain background there


# Statistics.


def test_frechet_of_gaussians_with_a_closed_form():
    """Of commuting covariances it is the squared distance of means plus that of the square roots of eigenvalues."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    a, b = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6)
    a[0] = 0  # a singular covariance
    means = rng.standard_normal((2, 6))
    expected = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    covs = [(basis * values) @ basis.T for values in (a, b)]
    # Products of order 16 are rounded by 4e-15; an eigenvalue that should be 0 is then off by 6e-8 after its root.
    assert frechet(means[0], covs[0], means[1], covs[1]) == pytest.approx(expected, abs=5e-7)
    assert frechet(means[0], covs[0], means[0], covs[0]) == pytest.approx(0, abs=5e-7)


def test_frechet_of_samples_tends_to_that_of_their_distributions():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((20000, 3)), 1 + 2 * rng.standard_normal((20000, 3))
    # 3 (1 + (2 - 1)^2) = 6; the mean's error alone is 2 sqrt(3) sqrt(5 / 20000) = 0.055 per standard deviation.
    assert frechet(*moments(x), *moments(y)) == pytest.approx(6, abs=0.25)


def test_bootstrap_of_the_mean_has_the_known_width():
    values = np.random.default_rng(2).standard_normal(400)
    interval = mean_interval(values, resample(400, 4000, seed=0))
    error = values.std() / 20
    # 4000 resamples know a 2.5 percentile to about 3 % of its distance from the mean.
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    constant = mean_interval(np.ones(10), resample(10, 50, seed=0))
    assert (constant.low, constant.value, constant.high) == (1, 1, 1)


def test_paired_resampling_cancels_what_samplers_share():
    rng = np.random.default_rng(3)
    real, shared = rng.standard_normal((64, 4)), rng.standard_normal((64, 4))
    draws = resample(64, 60, seed=0)
    a, b = (frechet_replicates(shared + shift, real, draws) for shift in (0.5, 0.51))
    assert np.array_equal(a, frechet_replicates(shared + 0.5, real, draws))
    alone, paired = normal_interval(0, b), normal_interval(0, b - a)
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


# Samplers.


def test_euler_with_one_step_is_the_velocity_at_the_noise(teacher):
    """And the schedule is the students' fixed shift, although this base's scheduler says otherwise."""
    assert teacher.pipe.scheduler.config.shift == 3.2 and not teacher.pipe.scheduler.config.use_dynamic_shifting
    path, images = teacher.walk(CAPTIONS, SEEDS, 2)
    assert path.shape == (3, 3, 16, 64) and images.shape == (3, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(teacher.pipe.scheduler.sigmas.numpy(), [1, 3.2 / 4.2, 0], rtol=1e-6)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(SEEDS[1]))
    packed = noise.view(16, 4, 2, 4, 2).permute(1, 3, 0, 2, 4).reshape(16, 64)
    # Beyond x86 with AVX2, torch's own normals differ by up to 2e-6.
    np.testing.assert_allclose(path[0, 1], packed.numpy(), atol=3e-6)


def test_batches_do_not_change_a_picture(teacher):
    sampler = EulerSampler(teacher, 2)
    whole, done = generate_all(sampler, CAPTIONS, SEEDS), []
    sampler.batch = 2
    parts = generate_all(sampler, CAPTIONS, SEEDS, lambda *progress: done.append(progress))
    assert done == [(2, 3), (3, 3)]
    np.testing.assert_allclose(parts.latents, whole.latents, atol=1e-4)


def test_a_bundle_and_its_adapter_draw_the_same(bundles):
    bundle, adapter = BundleSampler(bundles("flux-tiny")), AdapterSampler(FLUX / "base", FLUX / "adapter")
    ours, theirs = bundle.generate(CAPTIONS, SEEDS), adapter.generate(CAPTIONS, SEEDS)
    # `arcflow verify`'s bound for float32, and one step of rounding to 8 bits.
    np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-4 * np.abs(theirs.latents).max())
    assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
    for a, b in zip(bundle.calls(CAPTIONS, SEEDS), adapter.calls(CAPTIONS, SEEDS), strict=True):
        assert (a.sigma, a.sigma_next) == pytest.approx((b.sigma, b.sigma_next))
        assert a.latents.shape == b.latents.shape and a.means.shape == b.means.shape
        np.testing.assert_allclose(a.logweights, b.logweights, atol=1e-3)


def test_a_small_batch_limit_of_a_bundle_is_kept_to(bundles):
    bundle = BundleSampler(bundles("flux-tiny"))
    whole = bundle.calls(CAPTIONS, SEEDS)
    bundle.batch = 2
    for a, b in zip(whole, bundle.calls(CAPTIONS, SEEDS), strict=True):
        np.testing.assert_allclose(a.means, b.means, atol=1e-3)


# Figures.


def test_the_arc_ends_where_the_whole_step_does():
    rng = np.random.default_rng(0)
    shapes = ((2, 4, 64), (2, 4, 3, 64), (2, 4, 3, 4), (2, 4, 2, 4))
    call = Call(*(rng.standard_normal(s).astype(np.float32) for s in shapes), 1.0, 0.76)
    points = paths.arc(call, 17)
    assert points.shape == (17, 2, 4, 64) and np.array_equal(points[0], call.latents)
    whole = update(call.latents, call.means, call.logweights, call.loggammas, 1.0, 1.0, 0.76)
    np.testing.assert_allclose(points[-1], whole, atol=1e-5)  # 16 float32 updates of numbers of order 1


def test_the_plane_of_a_flat_path_holds_it():
    t = np.linspace(0, 1, 20)[:, None]
    points = np.hstack([3 * t, t**2, np.zeros((20, 3))]) @ np.linalg.qr(np.random.default_rng(0).random((5, 5)))[0]
    center, plane = paths.principal_plane(points)
    np.testing.assert_allclose((points - center) @ plane.T @ plane + center, points, atol=1e-12)


def test_the_contact_sheet_has_its_size_and_its_images():
    images = {name: np.full((2, 64, 64, 3), value, np.uint8) for name, value in (("real", 10), ("ArcFlow", 200))}
    sheet = contact_sheet([Section("first", ["a", "b"], images), Section("second", ["c", "d"], images)])
    width = 2 * MARGIN + CAPTION + 2 * 128 + GAP
    assert sheet.size == (width, 2 * MARGIN + HEADING + 2 * TITLE + 4 * 128 + 3 * GAP)
    x, y = MARGIN + CAPTION + 128 + GAP, MARGIN + HEADING + TITLE
    assert sheet.getpixel((x + 1, y + 1)) == (200, 200, 200) and sheet.getpixel((x - GAP - 2, y + 1)) == (10, 10, 10)


# The command.


def test_the_command_writes_everything(tmp_path, judge_dir, capsys):
    out = tmp_path / "out"
    given = arguments(FLUX / "adapter", out, judge_dir, "--student", f"linear={FLUX / 'adapter'}")
    assert cli.main(given) == cli.DONE
    assert {f.name for f in out.iterdir()} == {"eval.json", "table.md", "contact_sheet.png", "paths.png"}
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    result = json.loads((out / "eval.json").read_text())
    assert [s["name"] for s in result["samplers"]] == ["real", "teacher-3", "teacher-2", "linear", "arcflow"]
    # Other pictures of the same captions: their distance from the first ones is not 0.
    assert all(score["frechet"]["value"] > 1e-6 for score in result["samplers"][0]["scores"].values())
    assert result["samplers"][1]["scores"]["all"]["latent_error"] is None
    for sampler in result["samplers"]:
        for score in sampler["scores"].values():
            assert all(i is None or i["low"] <= i["value"] <= i["high"] for i in score.values())
    linear, arcflow = result["samplers"][3:]
    assert linear["scores"] == arcflow["scores"] and arcflow["network_calls"] == 2
    assert set(arcflow["scores"]) == {"all", "seen", "held-out"}
    errors = {group: score["latent_error"]["value"] for group, score in arcflow["scores"].items()}
    assert errors["all"] == pytest.approx((errors["seen"] + errors["held-out"]) / 2)  # four prompts each
    for score in arcflow["scores"].values():
        assert score["latent_error"]["low"] <= score["latent_error"]["value"] <= score["latent_error"]["high"]
        assert score["frechet"]["value"] > 0
    assert result["samplers"][1]["scores"]["seen"]["psnr_db"] is None  # the reference
    assert {(d["student"], d["baseline"]) for d in result["differences"]} == {
        ("linear", "teacher-2"),
        ("arcflow", "teacher-2"),
    }
    assert result["settings"]["prompts"] == {"seen": 4, "held-out": 4} and result["settings"]["judge"] == "given"
    assert capsys.readouterr().out == (out / "table.md").read_text()
    assert Image.open(out / "contact_sheet.png").size[0] == 2 * MARGIN + CAPTION + 5 * (128 + GAP) - GAP
    assert Image.open(out / "paths.png").size[0] > 1000


@pytest.mark.slow
def test_an_earlier_evaluation_stays_until_the_new_one_is_whole(tmp_path, judge_dir, monkeypatch, teacher):
    out = tmp_path / "out"
    out.mkdir()
    (out / "eval.json").write_text("{}")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "TeacherPipeline", lambda _: teacher)
    monkeypatch.setattr(run, "contact_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(FLUX / "adapter", FLUX / "base", out, judge=judge_dir, options=EvaluationOptions(4, 0, (2,)))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (out / "eval.json").read_text() == "{}" and len(list(out.iterdir())) == 1


def test_what_is_no_evaluation_is_not_overwritten(tmp_path, judge_dir, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main(arguments(FLUX / "adapter", tmp_path, judge_dir)) == cli.FAILED
    assert "exists and is not an evaluation; it will not be overwritten, give another name" in capsys.readouterr().err
    assert cli.main(arguments(FLUX / "adapter", tmp_path / "no" / "out", judge_dir)) == cli.FAILED
    assert "is not a directory; create it first" in capsys.readouterr().err


def test_bad_bases_are_named(tmp_path):
    with pytest.raises(
        SourceError, match=r"base: .*nowhere is not a directory; give the teacher's directory in diffusers format"
    ):
        TeacherPipeline(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="_class_name must be 'FluxPipeline', got 'QwenImagePipeline'"):
        TeacherPipeline(GOLDEN / "qwen-tiny" / "base")
    shutil.copytree(FLUX / "base", tmp_path / "base")
    vae = tmp_path / "base" / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"block_out_channels": [4, 4], "latent_channels": 4}))
    with pytest.raises(SourceError, match=r"must reduce images 8x to 16 channels, .*; got 2x and 4"):
        TeacherPipeline(tmp_path / "base")


def test_bad_targets_and_judges_are_named(tmp_path, judge_dir, monkeypatch, teacher, capsys):
    monkeypatch.setattr(run, "TeacherPipeline", lambda _: teacher)
    assert cli.main(arguments(tmp_path, tmp_path / "out", judge_dir)) == cli.FAILED
    assert "must be a bundle (with manifest.json) or an adapter (with config.json)" in capsys.readouterr().err
    assert cli.main(arguments(GOLDEN / "qwen-tiny" / "adapter", tmp_path / "out", judge_dir)) == cli.FAILED
    assert "adapter" in capsys.readouterr().err
    nowhere = f"linear={tmp_path / 'nowhere'}"
    assert cli.main(arguments(FLUX / "adapter", tmp_path / "out", judge_dir, "--student", nowhere)) == cli.FAILED
    assert "nowhere has no config.json; give the directory of an adapter" in capsys.readouterr().err
    assert cli.main(arguments(FLUX / "adapter", tmp_path / "out", tmp_path / "judge")) == cli.FAILED
    assert "judge: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--student", "linear"], "--student must be NAME=DIR with a NAME of letters, digits, - and _, got 'linear'"),
        (["--student", "a b=x"], "got 'a b=x'"),
        (["--student", "a=x", "--student", "a=y"], "--student must give each name once, got 'a' twice"),
        (["--student", "arcflow=x"], "a student's name must not be arcflow, real or teacher-..., got 'arcflow'"),
        (["--count", "1"], "count must be at least 4, got 1"),
        (["--seed", "-1"], "seed must be between 0 and 2**32 - 1, got -1"),
        (["--teacher-steps", "0"], "teacher steps must be between 1 and 1000, got [0]"),
    ],
)
def test_bad_usage_is_named(more, message, tmp_path, capsys):
    assert cli.main(arguments(FLUX / "adapter", tmp_path / "out", tmp_path, *more)) == cli.BAD_USAGE
    assert message in capsys.readouterr().err


def test_options_are_sorted_and_checked():
    assert EvaluationOptions(teacher_steps=(2, 50, 4, 2)).teacher_steps == (50, 4, 2)
    assert EvaluationOptions(teacher_steps=(2, 50)).reference_steps == 50
    with pytest.raises(RequestError, match="teacher steps"):
        EvaluationOptions(teacher_steps=())


def test_the_judge_is_given_shipped_or_trained(tmp_path, judge_dir, monkeypatch):
    def find(judge):
        return run._judge(judge, tmp_path / "teacher", 0, lambda *_: None)[1]

    monkeypatch.setattr(run, "train_judge", lambda seed, progress: None)
    assert find(judge_dir) == "given" and find(None) == "trained"
    shutil.copytree(judge_dir, tmp_path / "judge")
    assert find(None) == "shipped"
