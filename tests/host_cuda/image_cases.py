"""Images of the real GPU runtime on the host driver: real cuda-core, real captures, our kernels' own source."""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import EngineError
from arcflow_runtime.gpu.cuda import open_device
from tests.host_cuda.control import Code, When

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")
#: What takes memory, on the device or off it.
ALLOCATING = ("cuMemAlloc", "cuMemAllocHost", "cuMemHostAlloc", "cuStreamCreate", "cuStreamCreateWithPriority")
WITHOUT_GRAPH = "pictures are enqueued without a CUDA graph: the capture failed: "


def draw(pipe, prompt=PROMPTS[0], **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe(prompt, **(defaults | arguments)).images


def allocations(driver):
    return sum(driver.calls(name) for name in ALLOCATING)


@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner"])
def test_plain_captured_and_replayed_images_are_those_of_the_cpu(name, on_gpu, plain, driver):
    pipe = on_gpu(name)
    expected = draw(plain[name])
    first = draw(pipe)
    np.testing.assert_allclose(first, expected, **CLOSE)
    assert driver.calls("cuGraphLaunch") == 0
    for count in (1, 2):
        np.testing.assert_array_equal(draw(pipe), first)
        assert (driver.calls("cuGraphLaunch"), driver.calls("cuStreamBeginCapture")) == (count, 1)


def test_pixels(on_gpu, plain):
    """A value that falls on the other side of a rounding is one level off."""
    pipe = on_gpu()
    expected = np.asarray(draw(plain["flux"], output_type="pil")[0]).astype(int)
    for _ in range(3):
        assert np.abs(np.asarray(draw(pipe, output_type="pil")[0]).astype(int) - expected).max() <= 1


def test_float16(on_gpu, plain):
    """The state stays float32; what the backbone reads is rounded by the kernels.

    The kernels' float32 sums may round differently from numpy's, by units of 2^-24 of values below 8, which then round
    to a neighbour in float16, 2^-8 apart there at most. Two steps of the tiny model pass such a difference on whole.
    """
    pipe = on_gpu("float16")
    first = draw(pipe)
    np.testing.assert_allclose(first, draw(plain["float16"]), rtol=0, atol=2 * 2.0**-8)
    for _ in range(2):
        np.testing.assert_array_equal(draw(pipe), first)


def test_a_replay_reads_what_was_staged_for_it(on_gpu, plain, driver):
    pipe = on_gpu()
    cases = list(itertools.product(PROMPTS, (1, 2), (3.5, 7.0)))
    for prompt, seed, guidance in cases:
        found = draw(pipe, prompt, seed=seed, guidance_scale=guidance)
        np.testing.assert_allclose(found, draw(plain["flux"], prompt, seed=seed, guidance_scale=guidance), **CLOSE)
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, len(cases) - 1)


def test_a_warm_image_is_one_launch_and_allocates_nothing(on_gpu, driver):
    pipe = on_gpu()
    pipe.warm_up([(1, 32, 48)], text_tokens=16)
    draw(pipe, output_type="pil")  # the prompt's embeddings are kept from here on
    driver.reset()
    draw(pipe, output_type="pil")
    assert allocations(driver) == 0
    launched = ["cuGraphLaunch", "cuEventCreate", "cuEventRecordWithFlags", "cuEventSynchronize", "cuEventDestroy"]
    assert [call for call in driver.log() if call != "cuEventElapsedTime"] == launched


def test_launching_is_not_deprecated(on_gpu):
    """cuda-core 1.2 deprecates launches into streams that are not its own, and takes twice as long for them."""
    pipe = on_gpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            draw(pipe)
    assert [str(w.message) for w in caught if w.category is DeprecationWarning] == []


def allocate(stream):
    """What an engine without static activations does when it runs."""
    error, address = cuda.cuMemAlloc(512)
    if error == 0:
        cuda.cuMemFree(address)


def synchronize(stream):
    cuda.cuStreamSynchronize(stream.handle)


def use_the_default_stream(stream):
    cuda.cuMemcpyHtoD(0, b"", 0)


@pytest.mark.parametrize("act", [allocate, synchronize, use_the_default_stream])
def test_an_engine_that_breaks_the_capture(act, on_gpu, plain, driver, caplog):
    """The images are enqueued plainly, which is said once."""
    pipe = on_gpu()
    pipe.backend.before_enqueue = lambda part, stream: act(stream)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(4):
            np.testing.assert_allclose(draw(pipe), draw(plain["flux"]), **CLOSE)
    said = [r.message for r in caplog.records if "CUDA graph" in r.message]
    assert len(said) == 1
    assert said[0].startswith(WITHOUT_GRAPH), said
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 0)


#: Where in a capture something goes wrong: the function, and which of its calls from the second image's start on.
IN_CAPTURE = [
    ("cuStreamBeginCapture", 1, When.ALWAYS),
    *(("cuLaunchKernelEx", n, When.IN_CAPTURE) for n in (1, 2, 3)),
    *(("cuMemcpyAsync", n, When.IN_CAPTURE) for n in (1, 5)),
    ("cuEventRecordWithFlags", 4, When.IN_CAPTURE),
    ("cuStreamEndCapture", 1, When.IN_CAPTURE),
    ("cuGraphInstantiateWithFlags", 1, When.ALWAYS),
]


@pytest.mark.parametrize(("function", "nth", "when"), IN_CAPTURE)
def test_a_driver_that_refuses_a_capture(function, nth, when, on_gpu, plain, driver, caplog):
    pipe = on_gpu()
    expected = draw(plain["flux"])
    draw(pipe)
    driver.fail(function, nth, Code.STREAM_CAPTURE_UNSUPPORTED, when)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(draw(pipe), expected, **CLOSE)
    assert driver.pending_failures() == 0
    said = [r.message for r in caplog.records if "CUDA graph" in r.message]
    assert len(said) == 1
    assert said[0].startswith(WITHOUT_GRAPH), said
