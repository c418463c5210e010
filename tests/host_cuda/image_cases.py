"""Images from the GPU runtime on the driver made of host memory: real cuda-core, captures and kernels."""

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
from tests.host_cuda.control import Code, Live, When

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")
#: Calls that allocate.
ALLOCATING = ("cuMemAlloc", "cuMemAllocHost", "cuMemHostAlloc", "cuStreamCreate", "cuStreamCreateWithPriority")
WITHOUT_GRAPH = "images are generated without a CUDA graph: the capture failed: "


def generate(pipe, prompt=PROMPTS[0], **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe(prompt, **(defaults | arguments)).images


def attempt(pipe, expected):
    """Generate an image: the message of its error, or None if it succeeded; then the image must be right."""
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


@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner"])
def test_a_preview_is_that_of_the_cpu(name, on_gpu, plain):
    pipe, found, expected = on_gpu(name), [], []
    image = generate(pipe)
    for _ in range(3):
        with_preview = generate(pipe, callback_on_preview=lambda step, x: found.append((step, x.copy())))
        np.testing.assert_array_equal(with_preview, image)
    generate(plain[name], callback_on_preview=lambda step, x: expected.append(x))
    assert [step for step, _ in found] == [0, 0, 0]
    for _, preview in found:
        np.testing.assert_allclose(preview, expected[0], **CLOSE)


def test_pixels(on_gpu, plain):
    """A value next to a rounding boundary may differ by one level."""
    pipe = on_gpu()
    expected = np.asarray(generate(plain["flux"], output_type="pil")[0]).astype(int)
    for _ in range(3):
        assert np.abs(np.asarray(generate(pipe, output_type="pil")[0]).astype(int) - expected).max() <= 1


def test_float16(on_gpu, plain):
    """The latents stay float32, and the kernels round what the backbone reads.

    With this seed the CPU and the kernels round all values alike, so that the bound for float32 holds.
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
    generate(pipe, output_type="pil")  # caches the prompt's embeddings
    driver.reset()
    generate(pipe, output_type="pil")
    assert allocations(driver) == 0
    launched = ["cuGraphLaunch", "cuEventCreate", "cuEventRecordWithFlags", "cuEventSynchronize", "cuEventDestroy"]
    assert [call for call in driver.log() if call != "cuEventElapsedTime"] == launched


def test_low_memory(on_gpu, plain, driver):
    """With `low_memory` there is no graph."""
    pipe = on_gpu(low_memory=True)
    for seed in (1, 2):
        steps = []
        found = generate(pipe, seed=seed, callback_on_step_end=lambda step, latents, steps=steps: steps.append(latents))
        np.testing.assert_allclose(found, generate(plain["flux"], seed=seed), **CLOSE)
        np.testing.assert_array_equal(steps[-1], found)
    assert driver.calls("cuStreamBeginCapture") == 0


def test_launching_is_not_deprecated(on_gpu):
    """cuda-core 1.2 deprecates launches into streams of other classes, which also take twice as long."""
    pipe = on_gpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            generate(pipe)
    assert [str(w.message) for w in caught if w.category is DeprecationWarning] == []


def test_kernels_are_loaded_once(on_gpu, driver):
    """cuda-core 1.2 never unloads code, so loading it for each pipeline would leak."""
    loaded = []
    for _ in range(3):
        pipe = on_gpu()
        generate(pipe)
        pipe.close()
        loaded.append(driver.live(Live.MODULES))
    assert loaded == [loaded[0]] * 3


def allocate(stream):
    """An engine does this in each run if its activations are not allocated beforehand."""
    error, address = cuda.cuMemAlloc(512)
    if error == 0:
        cuda.cuMemFree(address)


def synchronize(stream):
    cuda.cuStreamSynchronize(stream.handle)


def use_the_default_stream(stream):
    cuda.cuMemcpyHtoD(0, b"", 0)


@pytest.mark.parametrize("act", [allocate, synchronize, use_the_default_stream])
def test_an_engine_that_breaks_the_capture(act, on_gpu, plain, driver, caplog):
    """The images are generated without a graph, with one warning."""
    pipe = on_gpu()
    pipe.backend.before_enqueue = lambda part, stream: act(stream)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(4):
            np.testing.assert_allclose(generate(pipe), generate(plain["flux"]), **CLOSE)
    said = [r.message for r in caplog.records if "CUDA graph" in r.message]
    assert len(said) == 1
    assert said[0].startswith(WITHOUT_GRAPH), said
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 0)


#: Failures during the capture, which the second image makes: function, number of the call, when it counts.
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
    """The error says what the memory was for, or the image is right because room was made; the next image is right."""
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


@pytest.mark.parametrize(
    ("low_memory", "image"),
    [(False, 1), (False, 2), (False, 3), (True, 1)],
    ids=["plain", "captured", "replayed", "low"],
)
def test_every_call_may_fail(low_memory, image, on_gpu, plain, driver):
    """Each failing call gives a one-line error or a right image, and the next image is right."""
    expected = generate(plain["flux"])
    pipe = on_gpu(low_memory=low_memory, max_plans=1)

    def prepare():
        generate(pipe, width=16)  # evicts the plan of the image before
        for _ in range(image - 1):
            generate(pipe)
        driver.reset()

    for _ in range(2):  # the first image also loads the kernels
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
    """The context is lost, as on a GPU: every later image fails, and closing does not raise."""
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
    """An image has the same bits whatever other threads ran before it and whichever plans were evicted."""
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
