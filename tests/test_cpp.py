"""The C++ library through its C API, against the reference implementation's numbers and the Python pipeline."""

from __future__ import annotations

import ctypes
import re
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
    images = cpp_pipes(name).generate(**{form: [given]}, **arguments(case), on_step=lambda _, x: steps.append(x))
    assert len(steps) == case["nfe"]
    for i, x in enumerate(steps):
        close(x.reshape(images.latents.shape), reference[f"step{i}.latents"])
    np.testing.assert_array_equal(images.latents, steps[-1].reshape(images.latents.shape))
    # As in test_golden: the reference's float image is rounded once to 8 bits.
    image = images.pixels.astype(np.float32) / 255
    assert np.abs(image - reference["image"].transpose(0, 2, 3, 1)).max() <= 1.5 / 255


# The Python pipeline -------------------------------------------------------------------------------------------------


def kept_tokens(warnings) -> list[str]:
    """What warnings of prompts that were cut have in common in both runtimes: how many tokens were kept of how many."""
    return [re.findall(r"\d+ of \d+", warning)[-1] for warning in warnings]


REQUESTS = [
    {"prompts": PROMPTS[:1]},
    {"prompts": PROMPTS, "num_images_per_prompt": 2, "seeds": [1, 2, 3, 4, 5, 2**64 - 6]},
    {"prompts": [PROMPTS[0]] * 2, "seeds": [2**63]},
    {"prompts": PROMPTS[:2], "num_inference_steps": 4, "width": 16, "max_sequence_length": 7},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=["one", "batch", "twice", "four-steps"])
@pytest.mark.parametrize("name", [*FAMILIES, "shapes"])
def test_same_images_as_in_python(cpp_pipes, python_pipes, name, request_):
    given = {"height": 64, "width": 48, "seeds": [11]} | request_
    ours = cpp_pipes(name).generate(**given)
    given["prompt"], seeds = given.pop("prompts"), given.pop("seeds")
    given["seed"] = seeds if len(seeds) > 1 else seeds[0]
    close(ours.latents, python_pipes(name)(**given, output_type="latents").images)
    theirs = python_pipes(name)(**given)
    pixels = np.stack([np.asarray(image) for image in theirs.images])
    assert np.abs(ours.pixels.astype(int) - pixels).max() <= 1
    assert ours.seeds == seeds
    assert kept_tokens(ours.warnings) == kept_tokens(theirs.warnings)
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
def test_an_image_does_not_depend_on_its_batch(cpp_pipes, name):
    size = {"height": 64, "width": 48}
    together = cpp_pipes(name).generate(PROMPTS, seeds=[1, 2, 3, 4, 5, 6], num_images_per_prompt=2, **size)
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        alone = cpp_pipes(name).generate([prompt], seeds=[i + 1], **size)
        # Batched matrix products may sum in another order.
        bound = 1e-5 * np.abs(alone.latents).max()
        np.testing.assert_allclose(together.latents[i], alone.latents[0], rtol=0, atol=bound)


def test_defaults(cpp_pipes):
    images = cpp_pipes("shapes").generate(["a large red circle"])
    assert images.pixels.shape == (1, 64, 64, 3)
    [seed] = images.seeds
    np.testing.assert_array_equal(
        cpp_pipes("shapes").generate(["a large red circle"], seeds=[seed]).pixels, images.pixels
    )
    assert cpp_pipes("shapes").generate(["a large red circle"]).seeds != [seed]
    latents = cpp_pipes("shapes").generate(["a large red circle"], seeds=[seed], skip_decode=1)
    assert latents.pixels is None and "decode" not in latents.timings_ms
    np.testing.assert_array_equal(latents.latents, images.latents)


def test_timings(cpp_pipes):
    timings = cpp_pipes("flux-tiny").generate(["timed"], height=64, width=64).timings_ms
    stages = ["tokenize", "encode", "condition", "noise", "rotary", "backbone", "update", "decode"]
    assert sorted(timings) == sorted([*stages, "engines", "total"])
    assert all(ms >= 0 for ms in timings.values())
    assert timings["engines"] <= sum(timings[s] for s in stages) <= timings["total"]


LONG = 'it\'s a "very"\tlong\n \\prompt with \x7f é ' + "word " * 600
CUT = 'prompt "it\'s a \\"very\\"\\tlong\\n \\\\prompt with \\u007f é wor..." was cut for '


@pytest.mark.parametrize(
    ("name", "readers"), [("flux-tiny", ["CLIP (text_encoder): 75", "T5 (text_encoder_2): 511"]), ("qwen-tiny", [""])]
)
def test_warnings_of_prompts_that_are_cut(cpp_pipes, python_pipes, name, readers):
    theirs = python_pipes(name)([LONG, "x"], 32, 32, num_inference_steps=2, seed=1, output_type="latents")
    ours = cpp_pipes(name).generate([LONG, "x"], height=32, width=32, seeds=[1], skip_decode=1)
    close(ours.latents, theirs.images)
    # One warning for each text encoder; both runtimes keep as many tokens.
    assert len(ours.warnings) == len(theirs.warnings) == len(readers)
    for our, their, reader in zip(ours.warnings, theirs.warnings, readers, strict=True):
        assert our.startswith(CUT + (reader or "the text encoder: 512"))
        assert kept_tokens([our]) == kept_tokens([their])
    again = cpp_pipes(name).generate([LONG], height=32, width=32, seeds=[1], skip_decode=1)
    assert again.warnings == ours.warnings  # also when its tokens come from the cache


def test_warnings(cpp_pipes):
    images = cpp_pipes("qwen-tiny").generate(["x"], height=32, width=32, guidance_scale=2.5)
    assert images.warnings == ["this student takes no guidance; request.guidance_scale 2.5 was ignored"]
    images = cpp_pipes("flux-tiny").generate(["x"], height=32, width=32, num_inference_steps=1)
    assert images.warnings == ["request.num_inference_steps is 1, which gives a blurry image; use 2 or more"]
    images = cpp_pipes("flux-tiny").generate(["x"], height=32, width=32, num_inference_steps=5)
    assert images.warnings == [
        "request.num_inference_steps is 5, more than 2 times the 2 that this student was made for; "
        "more steps may not improve the image, use 2"
    ]
    images = cpp_pipes("flux-tiny").generate(["x"], height=32, width=32, num_inference_steps=4)
    assert images.warnings == []


def test_random_seeds_reproduce_each_image(cpp_pipes):
    images = cpp_pipes("flux-tiny").generate(["x"], height=32, width=32, num_images_per_prompt=2)
    first, second = images.seeds
    assert first != second
    for image, seed in zip(images.pixels, images.seeds, strict=True):
        alone = cpp_pipes("flux-tiny").generate(["x"], height=32, width=32, seeds=[seed])
        # As in test_an_image_does_not_depend_on_its_batch, but in 8 bits.
        assert np.abs(alone.pixels[0].astype(int) - image).max() <= 1
