"""Straight students from the C++ library on the driver made of host memory, with and without negative prompts.

Runs as cpp_images.py does. The library's own loop on the host, with the same engines, is what it must equal.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from tests.cpp import ENGINE_ERROR, embed
from tests.host_cuda.control import Code
from tests.host_cuda.cpp_images import CLOSE, allocations, ids, library, on_gpu, plain  # noqa: F401

PROMPTS = ("a red circle", "a blue square on a green background", "a fish")
NEGATIVES = ("blurred and ugly", "", "x")
#: Bundles of test_cpp_host_cuda.py, and those of them that are guided by negative prompts.
NAMES, GUIDED = ("flux", "float16", "qwen", "table", "slots"), ("qwen", "table", "slots")


def generate(pipe, name, prompts=PROMPTS[:1], negatives=(), **arguments):
    root = f"straight {name}"
    longest = 256 if name in GUIDED else 64
    tokens = {"tokens": [ids(root, p) for p in prompts], "negative_tokens": [ids(root, p) for p in negatives] or None}
    defaults = {"height": 32, "width": 48, "seeds": [3], "max_sequence_length": longest, "skip_decode": 1}
    return pipe.generate(**tokens, **(defaults | arguments))


def attempt(pipe, given, expected):
    """Generate an image: its error, or None if it succeeded; then the image must be right."""
    try:
        found = generate(pipe, **given).latents
    except embed.ArcFlowError as e:
        return e
    np.testing.assert_allclose(found, expected, **CLOSE)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_host(name, stepwise, on_gpu, plain):  # noqa: F811
    """Plain, captured and replayed, and step by step with a callback; sizes change the schedule of most of them."""
    pipe, host = on_gpu(f"straight {name}"), plain(f"straight {name}")
    for size in ({}, {"height": 64, "width": 64}):
        given = {"prompts": PROMPTS, "negatives": NEGATIVES if name in GUIDED else (), "skip_decode": 0} | size
        steps: list[np.ndarray] = []
        wanted = generate(host, name, **given, on_step=lambda _, x, steps=steps: steps.append(x))
        for _ in range(3):
            seen: list[np.ndarray] = []
            on_step = (lambda _, x, seen=seen: seen.append(x)) if stepwise else None
            found = generate(pipe, name, **given, on_step=on_step)
            np.testing.assert_allclose(found.latents, wanted.latents, **CLOSE)
            assert np.abs(found.pixels.astype(int) - wanted.pixels).max() <= 1
            for a, b in zip(seen, steps if stepwise else (), strict=True):
                np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDED)
def test_a_graph_serves_any_scale_and_any_text_of_its_lengths(name, on_gpu, plain, driver):  # noqa: F811
    pipe, host = on_gpu(f"straight {name}"), plain(f"straight {name}")
    for _ in range(2):
        generate(pipe, name, negatives=NEGATIVES[:1], true_cfg_scale=4)
    before, launches = allocations(driver), driver.calls("cuGraphLaunch")
    images = []
    for scale, seed in itertools.product((1.5, 7.0), (1, 2)):
        given = {"negatives": NEGATIVES[:1], "true_cfg_scale": scale, "seeds": [seed]}
        images.append(generate(pipe, name, **given).latents)
        np.testing.assert_allclose(images[-1], generate(host, name, **given).latents, **CLOSE)
    assert (allocations(driver), driver.calls("cuGraphLaunch")) == (before, launches + len(images))
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(images, 2))
    # A scale that does not guide takes the plan without the second run.
    alone = generate(pipe, name, negatives=NEGATIVES[:1], true_cfg_scale=1).latents
    np.testing.assert_array_equal(alone, generate(pipe, name).latents)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("name", ["flux", "qwen", "table"])
def test_every_memory_mode_gives_the_same_image(name, memory, on_gpu):  # noqa: F811
    given = {"prompts": PROMPTS[:2], "negatives": NEGATIVES[:2] if name in GUIDED else ()}
    wanted = generate(on_gpu(f"straight {name}"), name, **given).latents
    lean = on_gpu(f"straight {name}", memory=memory.encode())
    for _ in range(3):
        np.testing.assert_allclose(generate(lean, name, **given).latents, wanted, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("image", [1, 2], ids=["plain", "captured"])
def test_every_call_of_a_guided_image_may_fail(image, on_gpu, plain, driver):  # noqa: F811
    """Each failing call gives a one-line error or a right image, and the next image is right."""
    given = {"name": "table", "negatives": NEGATIVES[:1], "num_inference_steps": 2}
    expected = generate(plain("straight table"), **given).latents
    pipe = on_gpu("straight table", plans=1)

    def prepare():
        generate(pipe, **given, width=16)  # evicts the plan of the image before
        for _ in range(image - 1):
            generate(pipe, **given)
        driver.reset()

    for _ in range(2):
        prepare()
        generate(pipe, **given)
    calls = sum(not re.search("Free|Destroy|Unload", name) for name in driver.log())
    for nth in range(1, calls + 1):
        prepare()
        driver.fail("*", nth, Code.UNKNOWN)
        failed = attempt(pipe, given, expected)
        if failed is not None:
            assert failed.status == ENGINE_ERROR
            assert re.fullmatch(r".*(CUDA_ERROR_UNKNOWN|error 999).*", str(failed)), failed
        assert driver.pending_failures() == 0, f"call {nth} of {calls} was not made"
        np.testing.assert_allclose(generate(pipe, **given).latents, expected, **CLOSE)


@pytest.mark.slow
def test_an_engine_that_takes_one_image_at_a_time(on_gpu, plain):  # noqa: F811
    given = {"prompts": PROMPTS, "negatives": NEGATIVES}
    found = generate(on_gpu("straight qwen", batch=1), "qwen", **given).latents
    np.testing.assert_allclose(found, generate(plain("straight qwen"), "qwen", **given).latents, **CLOSE)


@pytest.mark.slow
def test_a_negative_prompt_for_flux_is_refused(on_gpu):  # noqa: F811
    with pytest.raises(
        embed.ArcFlowError, match=r"^request\.negative_tokens is not supported: this model is guided by"
    ):
        generate(on_gpu("straight flux"), "flux", negatives=NEGATIVES[:1])
