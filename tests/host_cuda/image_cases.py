"""Images of the real GPU runtime on the host driver: real cuda-core, real captures, our kernels' own source."""

from __future__ import annotations

import itertools
import logging
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import EngineError
from tests.host_cuda.control import Code, When

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")
#: What takes memory, on the device or off it.
ALLOCATING = ("cuMemAlloc", "cuMemAllocHost", "cuMemHostAlloc", "cuStreamCreate", "cuStreamCreateWithPriority")
WITHOUT_GRAPH = "images are generated without a CUDA graph: the capture failed: "


def generate(pipe, prompt=PROMPTS[0], **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe(prompt, **(defaults | arguments)).images


def attempt(pipe, expected):
    """What drawing failed with; None where it did not, and then the image must be right."""
    try:
        found = generate(pipe)
    except EngineError as e:
        return str(e)
    np.testing.assert_allclose(found, expected, **CLOSE)
    return None


def allocations(driver):
    return sum(driver.calls(name) for name in ALLOCATING)


@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner"])
def test_plain_captured_and_replayed_images_are_those_of_the_cpu(name, on_gpu, plain, driver):
    pipe = on_gpu(name)
    expected = generate(plain[name])
    first = generate(pipe)
    np.testing.assert_allclose(first, expected, **CLOSE)
    assert driver.calls("cuGraphLaunch") == 0
    for count in (1, 2):
        np.testing.assert_array_equal(generate(pipe), first)
        assert (driver.calls("cuGraphLaunch"), driver.calls("cuStreamBeginCapture")) == (count, 1)


def test_pixels(on_gpu, plain):
    """A value that falls on the other side of a rounding is one level off."""
    pipe = on_gpu()
    expected = np.asarray(generate(plain["flux"], output_type="pil")[0]).astype(int)
    for _ in range(3):
        assert np.abs(np.asarray(generate(pipe, output_type="pil")[0]).astype(int) - expected).max() <= 1


def test_float16(on_gpu, plain):
    """The state stays float32; what the backbone reads is rounded by the kernels.

    No value of this image falls on the other side of that rounding, so the difference is that of float32 sums alone.
    """
    pipe = on_gpu("float16")
    first = generate(pipe)
    np.testing.assert_allclose(first, generate(plain["float16"]), **CLOSE)
    for _ in range(2):
        np.testing.assert_array_equal(generate(pipe), first)


def test_a_replay_reads_what_was_staged_for_it(on_gpu, plain, driver):
    pipe = on_gpu()
    cases = list(itertools.product(PROMPTS, (1, 2), (3.5, 7.0)))
    for prompt, seed, guidance in cases:
        found = generate(pipe, prompt, seed=seed, guidance_scale=guidance)
        np.testing.assert_allclose(found, generate(plain["flux"], prompt, seed=seed, guidance_scale=guidance), **CLOSE)
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, len(cases) - 1)


def test_a_warm_image_is_one_launch_and_allocates_nothing(on_gpu, driver):
    pipe = on_gpu()
    pipe.warm_up([(1, 32, 48)], text_tokens=16)
    generate(pipe, output_type="pil")  # the prompt's embeddings are kept from here on
    driver.reset()
    generate(pipe, output_type="pil")
    assert allocations(driver) == 0
    launched = ["cuGraphLaunch", "cuEventCreate", "cuEventRecordWithFlags", "cuEventSynchronize", "cuEventDestroy"]
    assert [call for call in driver.log() if call != "cuEventElapsedTime"] == launched


def test_parts_that_are_open_for_their_stage_only(on_gpu, plain, driver):
    """With low memory; there is no graph then, and between images the plan's buffers are all that is on the device."""
    pipe = on_gpu(low_memory=True)
    for seed in (1, 2):
        steps = []
        found = generate(pipe, seed=seed, callback_on_step_end=lambda step, latents, steps=steps: steps.append(latents))
        np.testing.assert_allclose(found, generate(plain["flux"], seed=seed), **CLOSE)
        np.testing.assert_array_equal(steps[-1], found)
    assert driver.calls("cuStreamBeginCapture") == 0


def test_launching_is_not_deprecated(on_gpu):
    """cuda-core 1.2 deprecates launches into streams that are not its own, and takes twice as long for them."""
    pipe = on_gpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            generate(pipe)
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
            np.testing.assert_allclose(generate(pipe), generate(plain["flux"]), **CLOSE)
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
    expected = generate(plain["flux"])
    generate(pipe)
    driver.fail(function, nth, Code.STREAM_CAPTURE_UNSUPPORTED, when)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(generate(pipe), expected, **CLOSE)
    assert driver.pending_failures() == 0
    said = [r.message for r in caplog.records if "CUDA graph" in r.message]
    assert len(said) == 1
    assert said[0].startswith(WITHOUT_GRAPH), said


@pytest.mark.parametrize(
    ("function", "kind"), [("cuMemAlloc", "Host memory's"), ("cuMemHostAlloc", "page-locked host")]
)
def test_every_allocation_may_fail(function, kind, on_gpu, plain, driver):
    """The image fails with what the memory was for, or succeeds after making room; the next one is right."""
    expected = generate(plain["flux"])
    for nth in itertools.count(1):
        pipe = on_gpu()
        driver.fail(function, nth, Code.OUT_OF_MEMORY)
        failed = attempt(pipe, expected)
        assert failed is None or re.match(rf"\w+: .*bytes of {kind} memory", failed), failed
        reached = driver.pending_failures() == 0
        driver.reset()
        np.testing.assert_allclose(generate(pipe), expected, **CLOSE)
        pipe.close()
        if not reached:
            break
    assert nth > 5, "no allocation failed"


@pytest.mark.parametrize("image", [1, 2, 3], ids=["plain", "captured", "replayed"])
def test_every_call_may_fail(image, on_gpu, plain, driver):
    """A call that a driver refuses is one sentence or a fallback, and the next image is right."""
    expected = generate(plain["flux"])
    pipe = on_gpu(max_plans=1)

    def prepare():
        generate(pipe, width=16)  # takes the place of what is left of the image before
        for _ in range(image - 1):
            generate(pipe)
        driver.reset()

    for _ in range(2):  # the first time, the kernels are loaded too
        prepare()
        generate(pipe)
    calls = sum(not re.search("Free|Destroy", name) for name in driver.log())
    for nth in range(1, calls + 1):
        prepare()
        driver.fail("*", nth, Code.UNKNOWN)
        failed = attempt(pipe, expected)
        assert failed is None or re.fullmatch(r".*(CUDA_ERROR_UNKNOWN|Failed to create).*", failed), failed
        assert driver.pending_failures() == 0, f"call {nth} of {calls} was not made"
        np.testing.assert_allclose(generate(pipe), expected, **CLOSE)


@pytest.mark.parametrize("work", ["run:copy", "run:kernel", "run:engine", "run:graph"])
def test_work_that_fails_on_the_device_is_an_error(work, on_gpu, driver):
    """The context is lost then, as on a GPU: every later image fails too, and closing does not raise."""
    pipe = on_gpu()
    for _ in range(2):
        generate(pipe)
    driver.fail(work, 1, Code.LAUNCH_FAILED)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"^[^\n]*CUDA_ERROR_LAUNCH_FAILED[^\n]*; start this process again$"):
            generate(pipe)
    pipe.close()
    driver.reset()


def test_a_device_that_runs_out_of_memory_drops_other_shapes(on_gpu, plain, driver, caplog):
    pipe = on_gpu()
    generate(pipe, width=64)
    _, free, total = cuda.cuMemGetInfo()
    driver.set_memory(total - free)
    with caplog.at_level(logging.WARNING, "arcflow"):
        np.testing.assert_allclose(generate(pipe, width=32), generate(plain["flux"], width=32), **CLOSE)
    said = [r.message for r in caplog.records if "memory" in r.message]
    assert said == ["out of GPU memory: the CUDA graphs of 1 other shapes are dropped"]


def test_changing_shapes_of_many_threads(on_gpu, driver):
    """A replay's bits are those of any other, whoever drew in between and whatever was dropped meanwhile."""
    pipe = on_gpu(max_plans=2)
    cases = list(itertools.product(PROMPTS, (1, 2), (16, 32, 48)))
    alone = [generate(pipe, prompt, seed=seed, width=width) for prompt, seed, width in cases]
    again = int(os.environ.get("HOST_CUDA_AGAIN", "5"))
    every = [case for case in cases for _ in range(again)]
    with ThreadPoolExecutor(8) as pool:
        images = pool.map(lambda case: generate(pipe, case[0], seed=case[1], width=case[2]), every)
        for number, found in enumerate(images):
            np.testing.assert_array_equal(found, alone[number // again])
    assert driver.calls("cuGraphLaunch") > 0
