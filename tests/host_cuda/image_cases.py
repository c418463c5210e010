"""Images from the GPU runtime on the driver made of host memory: real cuda-core, captures and kernels."""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import EngineError
from arcflow_runtime.gpu.cuda import _kernels_of
from tests.golden_cases import arguments, check_case, golden
from tests.host_cuda.control import Code, Live, When
from tests.host_cuda.images import CLOSE, PROMPTS, WITHOUT_GRAPH, attempt, generate, levels

#: Calls that allocate.
ALLOCATING = ("cuMemAlloc", "cuMemAllocHost", "cuMemHostAlloc", "cuStreamCreate", "cuStreamCreateWithPriority")


def allocations(driver):
    return sum(driver.calls(name) for name in ALLOCATING)


@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner"])
def test_plain_captured_and_replayed_images_are_those_of_the_cpu(name, on_gpu, plain, driver):
    pipe, steps = on_gpu(name), 3 if name == "conditioner" else 2
    first = generate(pipe, num_inference_steps=steps)
    np.testing.assert_allclose(first, generate(plain[name], num_inference_steps=steps), **CLOSE)
    assert driver.calls("cuGraphLaunch") == 0
    for count in (1, 2):
        np.testing.assert_array_equal(generate(pipe, num_inference_steps=steps), first)
        assert (driver.calls("cuGraphLaunch"), driver.calls("cuStreamBeginCapture")) == (count, 1)


@pytest.mark.parametrize(("name", "index"), list(itertools.product(("flux", "qwen"), range(3))))
def test_golden_images(name, index, on_gpu, driver):
    """The reference's latents of every step, and its image from plain calls, the captured graph and a replay."""
    case, reference = golden(f"{name}-tiny", index)
    pipe, steps = on_gpu(name), []
    request = arguments(case) | {"output_type": "numpy"}
    images = [pipe(**request, callback_on_step_end=lambda _, x: steps.append(x.copy())).images]
    assert len(steps) == case["nfe"]
    images += [pipe(**request).images for _ in range(2)]
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 2)
    for image in images:
        check_case(reference, steps, image)
        np.testing.assert_array_equal(image, images[0])


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
    expected = levels(generate(plain["flux"], output_type="pil"))
    for _ in range(3):
        assert np.abs(levels(generate(pipe, output_type="pil")) - expected).max() <= 1


@pytest.mark.slow
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
    cases = list(itertools.product(PROMPTS, (1, 1, 2), (3.5, 7.0)))
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
    """In the mode "low" there is no graph."""
    pipe = on_gpu(memory="low")
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
    assert said[0].startswith(f"{WITHOUT_GRAPH}the capture failed: "), said
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


@pytest.mark.slow
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
    assert said[0].startswith(f"{WITHOUT_GRAPH}the capture failed: "), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "kind"), [("cuMemAlloc", "Host memory's"), ("cuMemHostAlloc", "page-locked host")]
)
def test_every_allocation_may_fail(function, kind, on_gpu, plain, driver):
    """The error says what the memory was for, or the image is right because room was made; the next image is right."""
    expected = generate(plain["flux"])
    for nth in itertools.count(1):
        pipe = on_gpu()
        driver.fail(function, nth, Code.OUT_OF_MEMORY)
        failed = attempt(lambda pipe=pipe: generate(pipe), expected)
        assert failed is None or re.match(rf"\w+: .*bytes of {kind} memory", failed), failed
        reached = driver.pending_failures() == 0
        driver.reset()
        np.testing.assert_allclose(generate(pipe), expected, **CLOSE)
        pipe.close()
        if not reached:
            break
    assert nth > 5, "no allocation failed"


@pytest.mark.slow
@pytest.mark.parametrize("code", [Code.UNKNOWN, Code.OUT_OF_MEMORY], ids=["unknown", "memory"])
@pytest.mark.parametrize(
    ("name", "memory", "image"),
    [
        *(("flux", *way) for way in (("resident", 1), ("resident", 2), ("resident", 3), ("balanced", 2), ("low", 1))),
        *(("straight qwen", *way) for way in (("resident", 1), ("resident", 2), ("low", 1))),
    ],
)
def test_every_call_may_fail(name, memory, image, code, on_gpu, plain, driver):
    """Each failing call gives a one-line error or a right image, and the next image is right."""
    # Not cut, so that the two texts have different lengths.
    guided = {"negative_prompt": "blurred", "max_sequence_length": 256}
    arguments = guided if name == "straight qwen" else {}
    expected = generate(plain[name], **arguments)
    pipe = on_gpu(name, memory=memory, max_plans=1)

    def prepare():
        generate(pipe, width=16, **arguments)  # evicts the plan of the image before
        for _ in range(image - 1):
            generate(pipe, **arguments)
        driver.reset()

    for _ in range(2):  # the first image also loads the kernels
        prepare()
        generate(pipe, **arguments)
    calls = sum(not re.search("Free|Destroy", name) for name in driver.log())
    for nth in range(1, calls + 1):
        prepare()
        driver.fail("*", nth, code)
        failed = attempt(lambda pipe=pipe: generate(pipe, **arguments), expected)
        said = rf"CUDA_ERROR_{code.name}|Failed to create|bytes of (Host memory's|page-locked host) memory"
        assert failed is None or re.fullmatch(rf".*({said}).*; (load|generate|start) .*", failed), failed
        assert driver.pending_failures() == 0, f"call {nth} of {calls} was not made"
        np.testing.assert_allclose(generate(pipe, **arguments), expected, **CLOSE)


@pytest.mark.parametrize("function", ["cuLibraryLoadData", "cuLibraryGetKernel"])
def test_loading_the_kernels_may_fail(function, on_gpu, plain, driver):
    """The first image of a process loads them."""
    expected = generate(plain["flux"])
    _kernels_of.cache_clear()
    pipe = on_gpu()
    driver.fail(function, 1, Code.UNKNOWN)
    with pytest.raises(EngineError, match=r"^[^\n]*CUDA_ERROR_UNKNOWN[^\n]*; load the pipeline again$"):
        generate(pipe)
    np.testing.assert_allclose(generate(pipe), expected, **CLOSE)


def test_loading_a_pipeline_may_fail(on_gpu, driver):
    driver.fail("cuStreamCreateWithPriority", 1, Code.UNKNOWN)
    with pytest.raises(EngineError, match=r"^[^\n]*CUDA_ERROR_UNKNOWN[^\n]*; load the pipeline again$"):
        on_gpu()
    generate(on_gpu())


#: Failures of a process's first calls: function, error, and the sentence.
OPENING = [
    (
        "cuInit",
        Code.UNKNOWN,
        r"the CUDA driver finds no GPU here \(CUDA_ERROR_UNKNOWN\); check that nvidia-smi lists one",
    ),
    (
        "cuDevicePrimaryCtxRetain",
        Code.OUT_OF_MEMORY,
        "the GPU's memory is full, so this process cannot use it; end other programs that nvidia-smi lists",
    ),
    ("cuDeviceGetAttribute", Code.UNKNOWN, "the GPU failed: CUDA_ERROR_UNKNOWN; load the pipeline again"),
]


@pytest.mark.parametrize(("function", "error", "text"), OPENING)
def test_opening_the_device_may_fail(function, error, text):
    code = (
        "from tests.host_cuda.control import Code, Driver\nfrom arcflow_runtime.gpu.cuda import open_device\n"
        f"from arcflow_runtime import EngineError\nDriver().fail('{function}', 1, Code({int(error)}))\n"
        "try:\n    open_device().kernels()\nexcept EngineError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.fullmatch(text, done.stdout.strip()), done.stdout + done.stderr


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


@pytest.mark.slow
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
