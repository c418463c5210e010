"""The C++ library through its C ABI: against the reference's numbers, and against the Python pipeline."""

from __future__ import annotations

import ctypes
from ctypes import c_float

import numpy as np
import pytest

from arcflow_runtime.maths.noise import randn
from tests.conftest import FAMILIES
from tests.cpp import PROMPTS, close, ids_of
from tests.test_golden import CASES, golden


def arguments(case: dict) -> dict:
    guidance = {"guidance_scale": case["guidance_scale"]} if "guidance_scale" in case else {}
    names = ("height", "width", "max_sequence_length")
    return {n: case[n] for n in names} | {"num_inference_steps": case["nfe"], "seeds": [case["seed"]]} | guidance


# The reference implementation's numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["prompts", "tokens"])
@pytest.mark.parametrize(("name", "index"), CASES)
def test_golden_cases(cpp_pipes, cpp_bundles, name, index, form):
    case, reference = golden(name, index)
    steps: list[np.ndarray] = []
    given = case["prompt"] if form == "prompts" else ids_of(cpp_bundles(name), case["prompt"])
    drawing = cpp_pipes(name).draw(**{form: [given]}, **arguments(case), on_step=lambda _, x: steps.append(x))
    assert len(steps) == case["nfe"]
    for i, x in enumerate(steps):
        close(x.reshape(drawing.latents.shape), reference[f"step{i}.latents"])
    np.testing.assert_array_equal(drawing.latents, steps[-1].reshape(drawing.latents.shape))
    # As in test_golden: the reference's float image is rounded once to 8 bits.
    image = drawing.pixels.astype(np.float32) / 255
    assert np.abs(image - reference["image"].transpose(0, 2, 3, 1)).max() <= 1.5 / 255


# The Python pipeline -------------------------------------------------------------------------------------------------

REQUESTS = [
    {"prompts": PROMPTS[:1]},
    {"prompts": PROMPTS, "num_images_per_prompt": 2, "seeds": [1, 2, 3, 4, 5, 2**64 - 6]},
    {"prompts": [PROMPTS[0]] * 2, "seeds": [2**63]},
    {"prompts": PROMPTS[:2], "num_inference_steps": 4, "width": 16, "max_sequence_length": 7},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=["one", "batch", "twice", "four-steps"])
@pytest.mark.parametrize("name", [*FAMILIES, "shapes"])
def test_same_picture_as_in_python(cpp_pipes, python_pipes, name, request_):
    given = {"height": 64, "width": 48, "seeds": [11]} | request_
    ours = cpp_pipes(name).draw(**given)
    given["prompt"], seeds = given.pop("prompts"), given.pop("seeds")
    given["seed"] = seeds if len(seeds) > 1 else seeds[0]
    close(ours.latents, python_pipes(name)(**given, output_type="latents").images)
    theirs = python_pipes(name)(**given)
    pixels = np.stack([np.asarray(image) for image in theirs.images])
    assert np.abs(ours.pixels.astype(int) - pixels).max() <= 1
    assert ours.seeds == seeds
    assert ours.warnings == list(theirs.warnings)
    assert ours.timings_ms.keys() == theirs.timings_ms.keys() | {"engines"}


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, 2**64 - 1])
def test_noise_bit_for_bit(cpp_library, seed):
    for count in (0, 1, 7, 15, 16, 17, 31, 4096, 40_007):
        noise = np.full(count + 1, 7, np.float32)
        pointer = noise.ctypes.data_as(ctypes.POINTER(c_float))
        assert cpp_library.arcflow_noise(seed, count, pointer) == 0
        np.testing.assert_array_equal(noise[:count].view(np.uint32), randn(seed, (count,)).view(np.uint32))
        assert noise[count] == 7


def test_noise_of_torchs_negative_seeds(cpp_library):
    noise = np.empty(64, np.float32)
    assert cpp_library.arcflow_noise(2**64 - 3, 64, noise.ctypes.data_as(ctypes.POINTER(c_float))) == 0
    np.testing.assert_array_equal(noise, randn(-3, (64,)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_pictures_one_by_one(cpp_pipes, name):
    size = {"height": 64, "width": 48}
    together = cpp_pipes(name).draw(PROMPTS, seeds=[1, 2, 3, 4, 5, 6], num_images_per_prompt=2, **size)
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        alone = cpp_pipes(name).draw([prompt], seeds=[i + 1], **size)
        # Batched matrix products may sum in another order.
        bound = 1e-5 * np.abs(alone.latents).max()
        np.testing.assert_allclose(together.latents[i], alone.latents[0], rtol=0, atol=bound)


def test_defaults(cpp_pipes):
    drawing = cpp_pipes("shapes").draw(["a large red circle"])
    assert drawing.pixels.shape == (1, 64, 64, 3)
    [seed] = drawing.seeds
    np.testing.assert_array_equal(cpp_pipes("shapes").draw(["a large red circle"], seeds=[seed]).pixels, drawing.pixels)
    assert cpp_pipes("shapes").draw(["a large red circle"]).seeds != [seed]
    latents = cpp_pipes("shapes").draw(["a large red circle"], seeds=[seed], skip_decode=1)
    assert latents.pixels is None and "decode" not in latents.timings_ms
    np.testing.assert_array_equal(latents.latents, drawing.latents)


def test_timings(cpp_pipes):
    timings = cpp_pipes("flux-tiny").draw(["timed"], height=64, width=64).timings_ms
    stages = ["tokenize", "encode", "condition", "noise", "rotary", "backbone", "update", "decode"]
    assert sorted(timings) == sorted([*stages, "engines", "total"])
    assert all(ms >= 0 for ms in timings.values())
    assert timings["engines"] <= sum(timings[s] for s in stages) <= timings["total"]


def test_warnings(cpp_pipes, python_pipes):
    long = 'it\'s a "very"\tlong\n \\prompt with \x7f é ' + "word " * 600
    for name in FAMILIES:
        theirs = python_pipes(name)([long, "x"], 32, 32, num_inference_steps=2, seed=1, output_type="latents")
        ours = cpp_pipes(name).draw([long, "x"], height=32, width=32, seeds=[1], skip_decode=1)
        assert len(ours.warnings) == (2 if name == "flux-tiny" else 1)
        assert ours.warnings == list(theirs.warnings)
        close(ours.latents, theirs.images)
        again = cpp_pipes(name).draw([long], height=32, width=32, seeds=[1], skip_decode=1)
        assert again.warnings == ours.warnings  # though its tokens are kept
    drawing = cpp_pipes("qwen-tiny").draw(["x"], height=32, width=32, guidance_scale=2.5)
    assert drawing.warnings == ["this student takes no guidance; guidance_scale 2.5 was ignored"]
    drawing = cpp_pipes("flux-tiny").draw(["x"], height=32, width=32, num_inference_steps=1)
    assert drawing.warnings == ["num_inference_steps 1 gives a blurry picture; use 2 or more"]
