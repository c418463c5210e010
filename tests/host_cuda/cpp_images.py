"""Images from the C++ library on the driver made of host memory, through its C API: the counterpart of image_cases.py.

Runs in a process of its own, which tests/test_cpp_host_cuda.py starts. HOST_CUDA_CPP names the tests' library
(runtime/cpp/tests/host_backends.cpp), whose backend "host-cuda" runs OpenVINO in the place of a GPU's engines.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cpp import ENGINE_ERROR, close, embed, ids_of
from tests.host_cuda.build import NAME
from tests.host_cuda.control import Code, Live, When

GOLDEN = Path(__file__).parent.parent / "golden"
OUT_OF_MEMORY = 5
# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")
#: Calls that allocate.
ALLOCATING = ("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate")
WITHOUT_GRAPH = "arcflow: images are generated without a CUDA graph: the capture failed: "
ROOTS = json.loads(os.environ["HOST_CUDA_BUNDLES"])
_Act = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


@pytest.fixture(scope="session")
def library():
    library = embed.load(os.environ["HOST_CUDA_CPP"])
    library.host_backends_limits.argtypes = (ctypes.c_size_t, ctypes.c_int64)
    library.host_backends_weights.argtypes = (ctypes.c_int,)
    return library


@pytest.fixture
def on_gpu(library, driver):
    """A function (bundle's name, plans, batch, **options) -> pipeline. Checks at the end that all is given back.

    `kept` are kinds that a test may leave behind.
    """
    made = []
    before = {kind: driver.live(kind) for kind in Live}

    def make(name="flux", plans=8, batch=64, **options):
        library.host_backends_limits(plans, batch)
        made.append(embed.Pipeline(library, ROOTS[name], backend=b"host-cuda", threads=1, **options))
        return made[-1]

    make.kept = set()
    yield make
    library.host_backends_before_enqueue(None)
    library.host_backends_weights(0)
    for pipe in made:
        pipe.close()
    kinds = set(Live) - make.kept
    assert {kind.name: driver.live(kind) for kind in kinds if driver.live(kind) > before[kind]} == {}


@pytest.fixture(scope="session")
def plain(library):
    """A function (bundle's name) -> its pipeline on the CPU."""
    return functools.cache(lambda name: embed.Pipeline(library, ROOTS[name], backend=b"openvino", threads=1))


@functools.cache
def ids(name, prompt):
    return ids_of(Path(ROOTS[name]), prompt)


def generate(pipe, name="flux", prompts=PROMPTS[:1], **arguments):
    # Qwen-Image's tiny tokenizer makes up to 198 ids of the template and a prompt.
    longest = 256 if name in ("qwen", "conditioner") else 64
    defaults = {"height": 32, "width": 48, "seeds": [3], "max_sequence_length": longest, "skip_decode": 1}
    return pipe.generate(tokens=[ids(name, p) for p in prompts], **(defaults | arguments))


def allocations(driver):
    return sum(driver.calls(name) for name in ALLOCATING)


def attempt(pipe, expected):
    """Generate an image: its error, or None if it succeeded; then the image must be right."""
    try:
        found = generate(pipe).latents
    except embed.ArcFlowError as e:
        return e
    np.testing.assert_allclose(found, expected, **CLOSE)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_golden_cases(name, index, stepwise, on_gpu, driver):
    """The reference implementation's numbers, plain, captured and replayed, and step by step with a callback."""
    folder = GOLDEN / f"{name}-tiny"
    case = json.loads((folder / "cases.json").read_text())[index]
    reference = load_file(folder / f"case{index}.safetensors")
    given = {n: case[n] for n in ("height", "width", "max_sequence_length", "guidance_scale") if n in case}
    given |= {"num_inference_steps": case["nfe"], "seeds": [case["seed"]], "skip_decode": 0}
    pipe = on_gpu(name)
    for _ in range(3):
        steps: list[np.ndarray] = []
        on_step = (lambda _, x, steps=steps: steps.append(x)) if stepwise else None
        images = generate(pipe, name, [case["prompt"]], on_step=on_step, **given)
        for i, latents in enumerate(steps):
            close(latents.reshape(images.latents.shape), reference[f"step{i}.latents"])
        assert len(steps) == (case["nfe"] if stepwise else 0)
        close(images.latents, reference[f"step{case['nfe'] - 1}.latents"])
        # As in test_golden: the reference's float image is rounded once to 8 bits.
        image = images.pixels.astype(np.float32) / 255
        assert np.abs(image - reference["image"].transpose(0, 2, 3, 1)).max() <= 1.5 / 255
    assert driver.calls("cuGraphLaunch") == (0 if stepwise else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner"])
def test_plain_captured_and_replayed_images_are_those_of_the_cpu(name, on_gpu, plain, driver):
    pipe = on_gpu(name)
    expected = generate(plain(name), name, skip_decode=0)
    first = generate(pipe, name, skip_decode=0)
    np.testing.assert_allclose(first.latents, expected.latents, **CLOSE)
    # A value next to a rounding boundary may differ by one level.
    assert np.abs(first.pixels.astype(int) - expected.pixels).max() <= 1
    assert driver.calls("cuGraphLaunch") == 0
    for count in (1, 2):
        again = generate(pipe, name, skip_decode=0)
        np.testing.assert_array_equal(again.latents, first.latents)
        np.testing.assert_array_equal(again.pixels, first.pixels)
        assert (driver.calls("cuGraphLaunch"), driver.calls("cuStreamBeginCapture")) == (count, 1)


@pytest.mark.slow
def test_float16(on_gpu, plain):
    """The latents stay float32, and the kernels round what the backbone reads.

    With this seed the CPU and the kernels round all values alike, so that the bound for float32 holds.
    """
    pipe = on_gpu("float16")
    first = generate(pipe).latents
    np.testing.assert_allclose(first, generate(plain("float16")).latents, **CLOSE)
    for _ in range(2):
        np.testing.assert_array_equal(generate(pipe).latents, first)


def test_a_replay_reads_what_was_staged_for_it(on_gpu, plain, driver):
    pipe = on_gpu()
    cases = list(itertools.product(PROMPTS, (1, 2), (3.5, 7.0)))
    for prompt, seed, guidance in cases:
        given = {"prompts": [prompt], "seeds": [seed], "guidance_scale": guidance}
        expected = generate(plain("flux"), **given).latents
        np.testing.assert_allclose(generate(pipe, **given).latents, expected, **CLOSE)
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, len(cases) - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "jobs"), [("flux", 1), ("qwen", 2)])
def test_a_batch_of_several_prompts(name, jobs, on_gpu, plain, driver):
    """FLUX pads its texts to one length; Qwen-Image does not, and each length has a graph of its own."""
    pipe = on_gpu(name)
    for _ in range(3):
        given = {"prompts": [PROMPTS[0], PROMPTS[1], PROMPTS[0]], "seeds": [1, 2, 3]}
        expected = generate(plain(name), name, **given).latents
        np.testing.assert_allclose(generate(pipe, name, **given).latents, expected, **CLOSE)
        steps = []
        stepwise = generate(pipe, name, **given, on_step=lambda _, x, steps=steps: steps.append(x))
        np.testing.assert_array_equal(steps[-1].reshape(expected.shape), stepwise.latents)
        np.testing.assert_allclose(stepwise.latents, expected, **CLOSE)
    assert driver.calls("cuStreamBeginCapture") == jobs


def test_a_batch_larger_than_the_engine_takes(on_gpu, plain):
    pipe = on_gpu(batch=2)
    given = {"seeds": [1, 2, 3, 4, 5], "num_images_per_prompt": 5}
    np.testing.assert_allclose(generate(pipe, **given).latents, generate(plain("flux"), **given).latents, **CLOSE)


def test_a_warm_image_is_one_launch_and_allocates_nothing(on_gpu, driver):
    pipe = on_gpu()
    for _ in range(2):
        generate(pipe, skip_decode=0)
    driver.reset()
    generate(pipe, skip_decode=0)
    assert allocations(driver) == 0
    launched = ["cuGraphLaunch", "cuEventRecordWithFlags", "cuEventSynchronize"]
    assert [call for call in driver.log() if call != "cuEventElapsedTime"] == launched


def allocate(driver, stream):
    """An engine does this in each run if its activations are not allocated beforehand."""
    address = ctypes.c_uint64()
    if driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(512)) == 0:
        driver.cuMemFree_v2(address)


def synchronize(driver, stream):
    driver.cuStreamSynchronize(ctypes.c_void_p(stream))


def synchronize_everything(driver, stream):
    driver.cuCtxSynchronize()


@pytest.mark.parametrize("act", [allocate, synchronize, synchronize_everything])
def test_an_engine_that_breaks_the_capture(act, library, on_gpu, plain, driver, capfd):
    """The images are generated without a graph, with one warning."""
    pipe = on_gpu()
    loaded = ctypes.CDLL(NAME)
    acts = _Act(lambda part, stream: act(loaded, stream))
    library.host_backends_before_enqueue(acts)
    for _ in range(4):
        np.testing.assert_allclose(generate(pipe).latents, generate(plain("flux")).latents, **CLOSE)
    said = [line for line in capfd.readouterr().err.splitlines() if "CUDA graph" in line]
    assert len(said) == 1
    assert said[0].startswith(WITHOUT_GRAPH), said
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 0)
    library.host_backends_before_enqueue(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "nth", "when"),
    [
        ("cuStreamBeginCapture", 1, When.ALWAYS),
        *(("cuLaunchKernel", n, When.IN_CAPTURE) for n in (1, 2, 3)),
        *(("cuMemcpyAsync", n, When.IN_CAPTURE) for n in (1, 5)),
        ("cuEventRecordWithFlags", 4, When.IN_CAPTURE),
        ("cuStreamEndCapture", 1, When.IN_CAPTURE),
        ("cuGraphInstantiateWithFlags", 1, When.ALWAYS),
    ],
)
def test_a_driver_that_refuses_a_capture(function, nth, when, on_gpu, plain, driver, capfd):
    pipe = on_gpu()
    expected = generate(plain("flux")).latents
    generate(pipe)
    driver.fail(function, nth, Code.STREAM_CAPTURE_UNSUPPORTED, when)
    for _ in range(3):
        np.testing.assert_allclose(generate(pipe).latents, expected, **CLOSE)
    assert driver.pending_failures() == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "CUDA graph" in line]
    assert len(said) == 1
    assert re.match(re.escape(WITHOUT_GRAPH) + r"CUDA cannot .*: CUDA_ERROR_\w+ \(.*\)$", said[0]), said


@pytest.mark.slow
@pytest.mark.parametrize("image", [1, 2, 3], ids=["plain", "captured", "replayed"])
def test_every_call_may_fail(image, on_gpu, plain, driver):
    """Each failing call gives a one-line error or a right image, and the next image is right.

    Those of single engines, of other memory modes and with LoRAs are in trt_denoiser_test.cpp.
    """
    expected = generate(plain("flux")).latents
    pipe = on_gpu(plans=1)

    def prepare():
        generate(pipe, width=16)  # evicts the plan of the image before
        for _ in range(image - 1):
            generate(pipe)
        driver.reset()

    for _ in range(2):
        prepare()
        generate(pipe)
    calls = sum(not re.search("Free|Destroy|Unload", name) for name in driver.log())
    for nth in range(1, calls + 1):
        prepare()
        driver.fail("*", nth, Code.UNKNOWN)
        failed = attempt(pipe, expected)
        if failed is not None:
            assert failed.status == ENGINE_ERROR
            assert re.fullmatch(r".*(CUDA_ERROR_UNKNOWN|error 999).*", str(failed)), failed
        assert driver.pending_failures() == 0, f"call {nth} of {calls} was not made"
        np.testing.assert_allclose(generate(pipe).latents, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["cuMemAlloc", "cuMemHostAlloc"])
def test_every_allocation_may_fail(function, on_gpu, plain, driver):
    """The error says what the memory was for, or the image is right because room was made; the next image is right."""
    expected = generate(plain("flux")).latents
    for nth in itertools.count(1):
        pipe = on_gpu()
        driver.fail(function, nth, Code.OUT_OF_MEMORY)
        failed = attempt(pipe, expected)
        if failed is not None:
            assert failed.status == OUT_OF_MEMORY
            kind = r"(Host memory's memory, [\d,]+ are free|page-locked host memory cannot .*)"
            assert re.match(rf"\w+: .* bytes of {kind}; ", str(failed)), failed
        reached = driver.pending_failures() == 0
        driver.reset()
        np.testing.assert_allclose(generate(pipe).latents, expected, **CLOSE)
        pipe.close()
        if not reached:
            break
    assert nth > 5, "no allocation failed"


@pytest.mark.parametrize("work", ["run:copy", "run:kernel", "run:engine", "run:graph"])
def test_work_that_fails_on_the_device_is_an_error(work, on_gpu, driver):
    """The context is lost, as on a GPU: every later image fails, and closing does not crash."""
    pipe = on_gpu()
    on_gpu.kept.add(Live.MODULES)  # a lost context cannot unload code
    for _ in range(2):
        generate(pipe)
    driver.fail(work, 1, Code.LAUNCH_FAILED)
    for _ in range(2):
        with pytest.raises(
            embed.ArcFlowError, match=r"^[^\n]*CUDA_ERROR_LAUNCH_FAILED[^\n]*; start this process again$"
        ):
            generate(pipe)
    pipe.close()
    driver.reset()


def test_a_device_that_runs_out_of_memory_drops_other_shapes(on_gpu, plain, driver, capfd):
    pipe = on_gpu()
    generate(pipe, width=64)
    driver.set_memory(driver.live(Live.DEVICE_BYTES))
    found = generate(pipe, width=32).latents
    np.testing.assert_allclose(found, generate(plain("flux"), width=32).latents, **CLOSE)
    said = [line for line in capfd.readouterr().err.splitlines() if "memory" in line]
    assert said == ["arcflow: out of GPU memory: the CUDA graphs of 1 other shapes are dropped"]


def test_a_device_that_is_too_small_says_so(on_gpu, driver):
    driver.set_memory(512)
    with pytest.raises(embed.ArcFlowError) as caught:
        generate(on_gpu())
    assert caught.value.status == OUT_OF_MEMORY
    assert re.fullmatch(
        r"text_encoder: inputs and outputs need [\d,]+ bytes of Host memory's memory, 512 are free; "
        r'open with the memory mode "balanced" or "low", or ask for fewer or smaller images',
        str(caught.value),
    )


def test_changing_shapes_of_many_threads(on_gpu, driver):
    """An image has the same bits whatever other threads ran before it and whichever plans were evicted."""
    pipe = on_gpu(plans=2)
    cases = list(itertools.product(PROMPTS, (1, 2), (16, 32, 48)))
    alone = [generate(pipe, prompts=[p], seeds=[s], width=w, skip_decode=0) for p, s, w in cases]
    again = int(os.environ.get("HOST_CUDA_AGAIN", "4"))
    every = [case for case in cases for _ in range(again)]
    with ThreadPoolExecutor(8) as pool:
        images = pool.map(
            lambda case: generate(pipe, prompts=[case[0]], seeds=[case[1]], width=case[2], skip_decode=0), every
        )
        for number, found in enumerate(images):
            np.testing.assert_array_equal(found.latents, alone[number // again].latents)
            np.testing.assert_array_equal(found.pixels, alone[number // again].pixels)
    assert driver.calls("cuGraphLaunch") > 0
