"""Straight students (B16) in the C++ library: schedules, steps, what both readers refuse, and images as in Python."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from fake_bundle import edit_manifest, make_bundle
from safetensors.torch import save_file

from arcflow_runtime import Bundle
from arcflow_runtime.disk import manifest
from arcflow_runtime.disk.manifest import MANIFEST, DynamicShift, Schedule
from arcflow_runtime.maths.euler import euler
from arcflow_runtime.maths.rotary import image_rotary
from arcflow_runtime.maths.schedule import conditioning_timesteps, sigmas
from tests.cpp import run
from tests.test_cpp_core import PLACE, both, core, equal_bits, tool  # noqa: F401
from tests.test_straight_runtime import DYNAMIC, make_straight

LINEAR = DynamicShift("linear", 1.5, 3.0, 256, 4096)
#: What a schedule has -> it, and the step counts to compare.
SCHEDULES = {
    "fixed": (Schedule(3.0, 1.0, 4), (1, 2, 4, 50)),
    "exponential": (Schedule(1.0, 1.0, 28, DYNAMIC), (1, 2, 8, 28)),
    "linear": (Schedule(1.0, 1.0, 28, LINEAR), (1, 2, 8, 28)),
    "terminal": (Schedule(1.0, 1.0, 50, DYNAMIC, 0.02), (1, 2, 50)),
    "own sigmas": (Schedule(2.0, 1.0, 3, sigmas=(1.0, 0.5, 0.25)), (3,)),
    "all of them": (Schedule(1.0, 1.0, 2, DYNAMIC, 0.1, (0.9, 0.3)), (2,)),
}


# The numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_equal_bit_for_bit(core, tmp_path, name):  # noqa: F811
    """Both sides call the C library's exp, and every other operation is one of IEEE's."""
    schedule, counts = SCHEDULES[name]
    for family, reference in (("flux", "bfloat16"), ("qwen-image", "float32")):
        root = make_straight(tmp_path / family, family, schedule)
        edit_manifest(root, reference_dtype=reference)
        for steps in counts:
            for tokens in (6, 1024, 6032):
                levels = sigmas(steps, schedule, tokens)
                timesteps = conditioning_timesteps(levels, family, reference, "linear")
                got = core("schedule", root / MANIFEST, steps, tokens, dtype=np.float64)
                equal_bits(got, np.concatenate([levels, timesteps.astype(np.float64)]))


def test_rotary_tables_are_not_rounded(core, tmp_path):  # noqa: F811
    root = make_straight(tmp_path / "bundle")
    edit_manifest(root, reference_dtype="bfloat16")
    m = Bundle.open(root).manifest
    wanted = image_rotary(m.rotary, m.family, "float32", 3, 4)
    got = core("image_rotary", root / MANIFEST, 3, 4).reshape(wanted.shape)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=PLACE)


def test_steps_and_guidance(core, tmp_path):  # noqa: F811
    rng = np.random.default_rng(0)
    names = ("latents", "velocity", "negative")
    x, v, n = (rng.standard_normal((2, 33, 64), np.float32) for _ in names)
    n[0, 0], v[0, 1] = v[0, 0] * np.float32(4 / 3), 0  # guidance of scale 4 takes the first to about 0
    n[0, 2] = v[0, 2] = 0
    save_file({name: torch.from_numpy(a) for name, a in zip(names, (x, v, n), strict=True)}, tmp_path / "tensors")
    step = 1 - 0.7619047619047619
    # A product and a difference, each rounded once, on either side.
    moved = core("euler", tmp_path / "tensors", repr(step)).reshape(x.shape)
    bound = 2 * PLACE * (2 * np.abs(step * v) + np.abs(x)) * (1 + 1e-6)
    assert (np.abs(moved - euler(x, v, step)) <= bound).all()
    guided = core("guide", tmp_path / "tensors", 4).reshape(v.shape)
    np.testing.assert_array_equal(guided[0, 1:3], np.zeros((2, 64)))
    v, n = v.astype(np.float64)[1], n.astype(np.float64)[1]
    c = n + 4 * (v - n)
    norms = np.linalg.norm(v, axis=-1, keepdims=True), np.linalg.norm(c, axis=-1, keepdims=True)
    # A difference, a product and a sum of numbers up to |n| + 4 |v - n|, then a quotient and a product of the result.
    size = (np.abs(n) + 4 * np.abs(v - n)) * norms[0] / norms[1]
    assert (np.abs(guided[1] - c * norms[0] / norms[1]) <= 6 * PLACE * size).all()


def test_the_pipeline_with_engines_that_record(cpp_build, tmp_path):
    """Run pipeline_straight_test.cpp on bundles whose graphs are not real."""
    roots = [
        make_straight(tmp_path / "flux", schedule=Schedule(1.0, 1.0, 2, DYNAMIC)),
        make_straight(tmp_path / "qwen", "qwen-image", baked=(2,)),
    ]
    run([cpp_build / "tests" / "pipeline_straight_test", *roots])


# What both readers refuse --------------------------------------------------------------------------------------------

SHIFT = dataclasses.asdict(DYNAMIC)
LINEAR_TEXT = 'for the sampler "linear" (B16)'
#: Changes of a straight Qwen-Image bundle with a table, and C++'s error without the file's name.
CHANGES = [
    ({"version": 3}, 'unknown keys ["sampler", "true_cfg_scale"]; '),
    ({"sampler": "euler"}, 'sampler must be one of ["momentum", "linear"], got "euler"'),
    ({"sampler": None}, 'sampler must be one of ["momentum", "linear"], got null'),
    ({"sampler": "momentum"}, "version must be 1 for these slots and formats (B14, B15), got 4"),
    ({"sampler": ...}, "version must be 1 for these slots and formats (B14, B15), got 4"),
    (
        {"provenance__adapter": {"name": "a", "revision": None, "sha256": "0" * 64}},
        f"provenance: adapter must be null {LINEAR_TEXT}, got an adapter",
    ),
    ({"latents__num_gaussians": 2}, "latents: num_gaussians must be 1 for a straight student, got 2"),
    ({"parts__backbone__outputs": []}, 'parts.backbone: outputs must be ["velocity"] for a straight student, got []'),
    ({"true_cfg_scale": "4"}, 'true_cfg_scale must be a number or null, got "4"'),
    ({"true_cfg_scale": None}, "true_cfg_scale must be between 1 and 65, got null"),
    ({"true_cfg_scale": ...}, "true_cfg_scale must be between 1 and 65, got null"),
    ({"true_cfg_scale": 0.5}, "true_cfg_scale must be between 1 and 65, got 0.5"),
    ({"true_cfg_scale": 65.5}, "true_cfg_scale must be between 1 and 65, got 65.5"),
    ({"schedule__terminal": 1.0}, "schedule: terminal must be above 0 and below 1, or null, got 1.0"),
    ({"schedule__terminal": 0}, "schedule: terminal must be above 0 and below 1, or null, got 0.0"),
    ({"schedule__terminal": True}, "schedule: terminal must be a number or null, got true"),
    ({"schedule__sigmas": 0.5}, "schedule: sigmas must be a list, got 0.5"),
    ({"schedule__sigmas": ["1"]}, 'schedule: sigmas[0] must be a number, got "1"'),
    ({"schedule__sigmas": []}, "schedule: sigmas must be falling from at most 1 and above 0, got []"),
    ({"schedule__sigmas": [1, 1]}, "schedule: sigmas must be falling from at most 1 and above 0, got [1.0, 1.0]"),
    ({"schedule__sigmas": [1.5, 1]}, "schedule: sigmas must be falling from at most 1 and above 0, got [1.5, 1.0]"),
    ({"schedule__sigmas": [1, 0]}, "schedule: sigmas must be falling from at most 1 and above 0, got [1.0, 0.0]"),
    ({"schedule__sigmas": [1]}, "schedule: num_inference_steps must be 1, the number of sigmas, got 2"),
    (
        {"schedule__sigmas": [1, 0.5], "schedule__timestep_ratio": 0.5},
        "schedule: timestep_ratio must be 1 with sigmas, got 0.5",
    ),
    ({"schedule__dynamic_shift": SHIFT}, "schedule: shift must be 1 with dynamic_shift, got 3.0"),
    (
        {"schedule__shift": 1, "schedule__dynamic_shift": SHIFT},
        "modulation must be null with dynamic_shift, which depends on the image's size, got a table",
    ),
    ({"schedule__num_inference_steps": 3}, "schedule: num_inference_steps must be one of [2], got 3"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=str)
def test_wrong_manifests(both, tmp_path, changes, message):  # noqa: F811
    root = make_straight(tmp_path / "bundle", "qwen-image", baked=(2,))
    edit_manifest(root, **changes)
    assert (both(root) or "").startswith(f"{root / MANIFEST}: {message}")


#: Changes of a straight FLUX bundle's dynamic shift, and C++'s error after "schedule: dynamic_shift".
SHIFT_CHANGES = [
    ({"kind": "cosine"}, ': kind must be one of ["exponential", "linear"], got "cosine"'),
    ({"kind": ...}, ': missing keys ["kind"]'),
    ({"base_shift": None}, ": base_shift must be a number, got null"),
    ({"base_image_tokens": -1}, ": base_image_tokens must be an integer of at least 0, got -1"),
    ({"max_image_tokens": 256}, ": base_image_tokens must be below max_image_tokens, got [256, 256]"),
    (
        {"base_shift": 17.0, "max_shift": 17.0},
        ": mu must be above -16 and at most 16 for every size, got 17.0",
    ),
    ({"kind": "linear", "base_shift": 0.0}, ": mu must be above 0 and at most 16 for every size, got -0.0"),
    ({"kind": "linear", "base_shift": 0.0, "max_shift": 0.0}, ": mu must be above 0 and at most 16 for every size"),
]


@pytest.mark.parametrize(("changes", "message"), SHIFT_CHANGES, ids=str)
def test_wrong_dynamic_shifts(both, tmp_path, changes, message):  # noqa: F811
    root = make_straight(tmp_path / "bundle", schedule=Schedule(1.0, 1.0, 2, DYNAMIC))
    assert both(root) is None
    edit_manifest(root, **{f"schedule__dynamic_shift__{key}": value for key, value in changes.items()})
    assert (both(root) or "").startswith(f"{root / MANIFEST}: schedule: dynamic_shift{message}")


def test_what_belongs_to_the_other_kind(both, tmp_path):  # noqa: F811
    root = make_straight(tmp_path / "flux")
    edit_manifest(root, true_cfg_scale=4.0)
    assert (both(root) or "").startswith(f"{root / MANIFEST}: true_cfg_scale must be null for a flux bundle, got 4.0")
    root = make_bundle(tmp_path / "momentum")
    edit_manifest(root, provenance__adapter=None)
    message = 'provenance: adapter must be given for the sampler "momentum" (B16), got null'
    assert (both(root) or "").startswith(f"{root / MANIFEST}: {message}")


CLASSES = {
    "": manifest.Manifest,
    "schedule": manifest.Schedule,
    "schedule__dynamic_shift": manifest.DynamicShift,
}


@pytest.mark.parametrize(("place", "class_"), CLASSES.items(), ids=str)
def test_both_know_the_same_keys(both, tmp_path, place, class_):  # noqa: F811
    root = make_straight(tmp_path / "bundle", schedule=Schedule(1.0, 1.0, 2, DYNAMIC))
    edit_manifest(root, **{f"{place}__surprise" if place else "surprise": 1})
    found = re.search(r'unknown keys \["surprise"\]; the known keys are (\[.*\])', both(root) or "")
    assert found
    known = {field.name for field in dataclasses.fields(class_)} | (set() if place else {"format", "version"})
    assert set(json.loads(found[1])) == known
