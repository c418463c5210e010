"""Bundles of straight students with a fake backend: schedule, step, guidance, and what readers refuse."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from fake_bundle import FakeBackend, FakeEngine, edit_manifest, list_files, make_bundle, write_manifest

from arcflow_runtime import BundleError, Pipeline, RequestError
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import MANIFEST, DynamicShift, Schedule, TensorSpec
from arcflow_runtime.maths.euler import guide
from arcflow_runtime.maths.schedule import conditioning_timesteps, sigmas

FIXED = Schedule(3.0, 1.0, 2)
DYNAMIC = DynamicShift("exponential", 0.5, 1.15, 256, 4096)


def make_straight(root, family="flux", schedule=FIXED, baked=()):
    make_bundle(root, family, baked=baked)
    m = Bundle.open(root).manifest
    backbone = dataclasses.replace(m.parts["backbone"], outputs=(TensorSpec("velocity", "float32", ("B", "N", 64)),))
    straight = dataclasses.replace(
        m,
        version=4,
        sampler="linear",
        schedule=schedule,
        latents=dataclasses.replace(m.latents, num_gaussians=1),
        parts={**m.parts, "backbone": backbone},
        provenance=dataclasses.replace(m.provenance, adapter=None),
        true_cfg_scale=4.0 if family == "qwen-image" else None,
        files=list_files(root),
    )
    write_manifest(root, straight)
    return root


class Engine(FakeEngine):
    def backbone(self, inputs):
        x, text = inputs["latents"].astype(np.float32), inputs["encoder_hidden_states"].astype(np.float32)
        return {"velocity": np.sin(x) + np.tanh(text.mean((1, 2)))[:, None, None]}


class Backend(FakeBackend):
    def open(self, bundle, part):
        super().open(bundle, part)
        return Engine(self, part, bundle.manifest.family)


def open_straight(root):
    pipe = Pipeline(Bundle.open(root), Backend())
    pipe.backend = pipe._parts._backend
    return pipe


def latents(pipe, prompt, **arguments):
    return pipe(prompt, **({"height": 32, "width": 48, "output_type": "latents"} | arguments)).images


@pytest.fixture(scope="module")
def qwen_root(tmp_path_factory):
    return make_straight(tmp_path_factory.mktemp("straight") / "qwen", "qwen-image", baked=(2,))


@pytest.fixture
def qwen(qwen_root):
    return open_straight(qwen_root)


def test_a_step_is_a_line(tmp_path):
    pipe = open_straight(make_straight(tmp_path / "b", schedule=Schedule(1.0, 1.0, 2, DYNAMIC, 0.1)))
    noise = np.linspace(-2, 2, 6 * 64, dtype=np.float32).reshape(1, 6, 64)
    steps = []
    keep = lambda _, x: steps.append(x.copy())  # noqa: E731
    latents(pipe, "x", latents=noise, callback_on_step_end=keep)
    # 32 x 48 pixels are 6 tokens. t is 1 and 0.5, the shift exp(mu), and the last sigma is stretched to 0.1.
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (6 - 256)
    assert sigmas(2, pipe.bundle.manifest.schedule, 6) == pytest.approx([1, 0.1, 0])
    assert sigmas(4, Schedule(1.0, 1.0, 2, DYNAMIC), 6)[1] == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / 3))
    text = np.tanh(pipe.backend.inputs["backbone"]["encoder_hidden_states"].mean(dtype=np.float64))
    x = noise.astype(np.float64)
    for step, got in zip((0.9, 0.1), steps, strict=True):
        x = x - step * (np.sin(x) + text)
        # Two products and sums of numbers up to 4 in float32, each rounded by at most 2^-24 of that.
        np.testing.assert_allclose(got, x, rtol=0, atol=2e-6)


def test_timesteps_are_rounded_as_in_diffusers():
    """0.7619 * 1000 is 760 in bfloat16, 760 / 1000 is 0.76171875, and 1000 times that is 760 again."""
    levels = np.array([1, 0.7619047619, 0])
    flux = conditioning_timesteps(levels, "flux", "bfloat16", "linear")
    np.testing.assert_array_equal(flux, np.array([1000, 760], np.float32))
    qwen = conditioning_timesteps(levels, "qwen-image", "bfloat16", "linear")
    np.testing.assert_array_equal(qwen, np.array([1000, 761.71875], np.float32))


def test_guidance_keeps_the_norm():
    rng = np.random.default_rng(0)
    v, n = rng.standard_normal((2, 2, 3, 8))
    c = n + 4 * (v - n)
    expected = c * np.linalg.norm(v, axis=-1, keepdims=True) / np.linalg.norm(c, axis=-1, keepdims=True)
    got = guide(v.astype(np.float32), n.astype(np.float32), 4.0)
    # A sum of 8 squares and a handful of products: each is off by at most 2^-24, relative to numbers up to 15.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    same = np.ones((1, 1, 8), np.float32)
    np.testing.assert_array_equal(guide(same, 2 * same, 2.0), np.zeros_like(same))


def test_a_negative_prompt_runs_the_backbone_twice(qwen):
    plain = latents(qwen, "a bird", seed=[1])
    assert [part for part, _ in qwen.backend.runs].count("backbone") == 2
    guided = latents(qwen, "a bird", seed=[1], negative_prompt=" ")
    assert [part for part, _ in qwen.backend.runs].count("backbone") == 2 + 4
    assert not np.array_equal(plain, guided)
    np.testing.assert_array_equal(latents(qwen, "a bird", seed=[1], negative_prompt=" ", true_cfg_scale=4), guided)
    np.testing.assert_array_equal(latents(qwen, "a bird", seed=[1], negative_prompt=" ", true_cfg_scale=1), plain)


def test_a_guided_image_does_not_depend_on_its_batch(qwen):
    prompts, negatives = ["a bird", "a much longer prompt than that", "a fish"], ["blurred", "", "ugly and blurred"]
    together = latents(qwen, prompts, seed=[1, 2, 3], negative_prompt=negatives)
    for i, image in enumerate(together):
        alone = latents(qwen, prompts[i], seed=[i + 1], negative_prompt=negatives[i])
        np.testing.assert_array_equal(image, alone[0])


def test_a_preview_follows_the_velocity_to_the_end(qwen):
    found = []
    noise = np.zeros((1, 6, 64), np.float32)
    latents(qwen, "x", latents=noise, callback_on_preview=lambda step, image: found.append((step, image)))
    text = np.tanh(qwen.backend.inputs["backbone"]["encoder_hidden_states"].mean(dtype=np.float64))
    assert [step for step, _ in found] == [0]
    np.testing.assert_allclose(found[0][1], np.full_like(noise, -text), rtol=1e-6)


def test_guidance_that_cannot_be(qwen, tmp_path):
    def fails(pipe, message, **arguments):
        with pytest.raises(RequestError) as e:
            latents(pipe, ["a", "b"], **arguments)
        assert str(e.value) == message

    fails(qwen, "true_cfg_scale must be between 0 and 65, got 66", negative_prompt="", true_cfg_scale=66)
    fails(qwen, "true_cfg_scale must be a number, got '4'", negative_prompt="", true_cfg_scale="4")
    fails(qwen, "negative_prompt must be a string or a list of strings, got 3", negative_prompt=3)
    fails(qwen, "negative_prompt must be a string or a list of 2, one per prompt, got 1", negative_prompt=["x"])
    flux = open_straight(make_straight(tmp_path / "flux"))
    reason = "this model is guided by guidance_scale or not at all; leave it out"
    fails(flux, f"negative_prompt is not supported: {reason}", negative_prompt="x")
    fails(flux, f"true_cfg_scale is not supported: {reason}", true_cfg_scale=4.0)


def test_warnings(qwen):
    unguided = "without a negative_prompt the images are not guided; give negative_prompt=' ' to guide them"
    assert qwen("x", height=32, width=48).warnings == (unguided,)
    assert qwen("x", height=32, width=48, true_cfg_scale=1).warnings == ()
    ignored = "true_cfg_scale 1 does not guide, so negative_prompt was ignored"
    assert qwen("x", height=32, width=48, negative_prompt="y", true_cfg_scale=1).warnings == (ignored,)


def test_own_sigmas_are_for_their_number_of_steps(tmp_path):
    pipe = open_straight(make_straight(tmp_path / "b", schedule=Schedule(2.0, 1.0, 3, sigmas=(1.0, 0.5, 0.25))))
    assert sigmas(3, pipe.bundle.manifest.schedule) == pytest.approx([1, 2 / 3, 0.4, 0])
    with pytest.raises(RequestError, match=r"^num_inference_steps must be 3, the number of sigmas in this bundle's"):
        latents(pipe, "x", num_inference_steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "unknown keys ['sampler', 'true_cfg_scale'] in a bundle of version 2 (B16)"),
        ({"sampler": "euler"}, "sampler must be one of ['momentum', 'linear'], got 'euler'"),
        ({"sampler": "momentum"}, "version must be 1 for these slots and formats (B14, B15), got 4"),
        ({"latents__num_gaussians": 2}, "latents: num_gaussians must be 1 for a straight student, got 2"),
        ({"true_cfg_scale": None}, "true_cfg_scale must be between 1 and 65, got None"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale must be between 1 and 65, got 0.5"),
        ({"schedule__terminal": 1.0}, "schedule: terminal must be above 0 and below 1, or null, got 1.0"),
        ({"schedule__sigmas": [1, 1]}, "schedule: sigmas must be falling from at most 1 and above 0, got [1.0, 1.0]"),
        ({"schedule__sigmas": [1]}, "schedule: num_inference_steps must be 1, the number of sigmas, got 2"),
        (
            {"schedule__shift": 1.0, "schedule__dynamic_shift": {**dataclasses.asdict(DYNAMIC)}},
            "modulation must be null",
        ),
    ],
)
def test_a_wrong_manifest(qwen_root, tmp_path, changes, message):
    make_straight(tmp_path / "b", "qwen-image", baked=(2,))
    edit_manifest(tmp_path / "b", **changes)
    with pytest.raises(BundleError) as e:
        Bundle.open(tmp_path / "b")
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_image_tokens": 256}, "base_image_tokens must be below max_image_tokens, got (256, 256)"),
        ({"base_shift": 17.0, "max_shift": 17.0}, "mu must be above -16 and at most 16 for every size, got 17.0"),
        ({"kind": "linear", "base_shift": 0.0}, "mu must be above 0 and at most 16 for every size, got "),
        ({"kind": "cosine"}, "kind must be one of ['exponential', 'linear'], got 'cosine'"),
    ],
)
def test_a_wrong_dynamic_shift(tmp_path, changes, message):
    root = make_straight(tmp_path / "b", schedule=Schedule(1.0, 1.0, 2, DYNAMIC))
    edit_manifest(root, **{f"schedule__dynamic_shift__{key}": value for key, value in changes.items()})
    with pytest.raises(BundleError) as e:
        Bundle.open(root)
    assert message in str(e.value)


def test_a_momentum_bundle_says_nothing_of_it(tmp_path):
    """Older readers reject keys that they do not know."""
    data = json.loads((make_bundle(tmp_path / "b") / MANIFEST).read_text())
    assert data["version"] == 1 and not data.keys() & {"sampler", "true_cfg_scale"}
    assert data["schedule"].keys() == {"shift", "timestep_ratio", "num_inference_steps"}
