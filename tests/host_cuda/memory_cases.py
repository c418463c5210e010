"""The memory modes on the driver made of host memory: equal images, and the bytes that the sums say."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import EngineError, Pipeline
from arcflow_runtime.engines.modes import EVERY_IMAGE, MODES, TENSORRT, EngineBytes
from arcflow_runtime.engines.onnxruntime import open_session
from arcflow_runtime.generate.memory import usual_size
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.onnxruntime import OrtEngine
from arcflow_runtime.memory.sums import BETWEEN, BundleMemory, ImageSize, make_sums, part_inputs
from tests.host_cuda.control import Live
from tests.host_cuda.engines import HostCudaBackend, PartEngine

#: Modes, each with whether weights can be unloaded alone, which only "balanced" asks for.
WAYS = [("resident", False), ("balanced", False), ("balanced", True), ("low", False)]
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")
TOKENS = 16


class WeighedEngine(PartEngine):
    """A part whose weights take device memory, as many bytes as their file has."""

    def __init__(self, backend, inner, nbytes):
        super().__init__(backend, inner)
        self._host, self._part, self._nbytes = backend, inner.part, nbytes
        self.load_weights()

    def load_weights(self):
        self._weights = self._host.lane.allocate(self._nbytes, f"{self._part}: weights")
        self._host.loads.append(self._part)

    def unload_weights(self):
        if self._host.unloads:
            self._weights.close()
        return self._host.unloads

    def close(self):
        self._weights.close()
        super().close()


class WeighedBackend(HostCudaBackend):
    """`HostCudaBackend` with engines that have weights. `loads` has the parts whose weights were loaded, in order.

    With `unloads`, weights are freed and loaded apart from the rest, as TensorRT-RTX can.
    """

    memory_rules = TENSORRT

    def __init__(self, driver, unloads=False):
        super().__init__(driver)
        self.unloads, self.loads = unloads, []
        self.before = driver.live(Live.DEVICE_BYTES)

    def open(self, bundle, part):
        def load():
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = open_session(bundle, part, options, ["CPUExecutionProvider"])
            engine = OrtEngine(bundle.manifest, part, session, "cpu")
            return WeighedEngine(self, engine, weights_of(bundle.manifest)[part])

        return HostEngine(self.lane, bundle.manifest, part, load)

    def open_unloadable(self, bundle, part):
        return self.open(bundle, part)

    def free_bytes(self):
        return self.lane.free_bytes()

    def built_bytes(self, bundle, part):
        return EngineBytes(weights_of(bundle.manifest)[part])

    def held(self):
        return self.driver.live(Live.DEVICE_BYTES) - self.before


@pytest.fixture
def weighed(open_bundle, driver):
    """A function (name, mode, unloads) -> pipeline; checks at the end that every byte was given back."""
    made, before = [], driver.live(Live.DEVICE_BYTES)

    def make(name="flux", memory=None, unloads=False):
        backend = WeighedBackend(driver, unloads)
        pipe = Pipeline(open_bundle(name), backend, memory)
        pipe.backend = backend
        made.append(pipe)
        return pipe

    yield make
    for pipe in made:
        pipe.close()
    assert driver.live(Live.DEVICE_BYTES) == before


def generate(pipe, prompt=PROMPTS[0], **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "numpy", "max_sequence_length": TOKENS}
    return pipe(prompt, **(defaults | arguments)).images


def weights_of(manifest):
    return {name: manifest.files[part.weights].bytes for name, part in manifest.parts.items()}


def sums_of(pipe):
    """The sums for `generate`; activations are what `HostCudaBackend`'s contexts ask for."""
    m = pipe.bundle.manifest
    size = ImageSize(1, 32, 48, TOKENS, 2)
    firsts = {part: next(iter(inputs.values())) for part, inputs in part_inputs(m, size).items()}
    return make_sums(m, size, TENSORRT, weights_of(m), {p: 64 * int(np.prod(shape)) for p, shape in firsts.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner", "float16"])
def test_images_are_equal_in_all_modes(name, weighed):
    """Plain, captured and replayed, also after a new prompt, guidance scale, number of steps and batch."""
    whole = {"max_sequence_length": 64}
    calls = [
        *((prompt, whole) for prompt in (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0])),
        (PROMPTS[0], whole | {"num_images_per_prompt": 2}),
        ([*PROMPTS], whole | {"seed": [5, 6]}),
    ]
    if name == "flux":
        calls += [(PROMPTS[0], whole | {"guidance_scale": 7.0}), (PROMPTS[1], whole | {"num_inference_steps": 3})]
    expected = None
    for memory, unloads in WAYS:
        pipe = weighed(name, memory, unloads)
        found = [generate(pipe, prompt, **arguments) for prompt, arguments in calls]
        expected = found if expected is None else expected
        for image, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize(("memory", "unloads"), WAYS)
@pytest.mark.parametrize("name", ["flux", "conditioner", "straight flux", "straight qwen"])
def test_bytes_held_in_each_stage_are_those_of_the_sums(name, memory, unloads, weighed):
    """Exactly, but for the encoders' inputs and outputs in "balanced", which go with an engine that is closed."""
    pipe = weighed(name, memory, unloads)
    # The sums count a negative prompt as long as the prompt.
    arguments = {"negative_prompt": PROMPTS[1][::-1]} if pipe.bundle.manifest.true_cfg_scale else {}
    generate(pipe, PROMPTS[1], **arguments)
    pipe.clear_cache()  # Qwen-Image's modulation would be cached for any prompt
    held = {}
    pipe.backend.before_enqueue = lambda part, stream: held.setdefault(part, pipe.backend.held())
    generate(pipe, PROMPTS[1], **arguments)
    held[BETWEEN] = pipe.backend.held()
    sums = sums_of(pipe)
    expected = sums.stages(memory)
    assert held.keys() == expected.keys()
    closed = memory == "balanced" and not unloads
    arrays = sum(sums.parts[part].arrays for part in sums.by_host[memory]) if closed else 0
    for stage, nbytes in expected.items():
        assert nbytes - arrays <= held[stage] <= nbytes, (stage, held, expected)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
def test_the_memory_of_the_sums_is_enough_and_needed(memory, weighed, driver):
    pipe = weighed("flux", memory)
    sums = sums_of(pipe)
    expected = [generate(pipe, prompt) for prompt in PROMPTS]
    pipe.close()
    driver.set_memory(pipe.backend.before + sums.peak(memory))
    small = weighed("flux", memory)
    for prompt, wanted in zip((*PROMPTS, *PROMPTS), expected * 2, strict=True):
        np.testing.assert_array_equal(generate(small, prompt), wanted)
    small.close()
    # The weights that are loaded at once and the plan do not fit into less.
    arrays = sum(part.arrays for part in sums.parts.values())
    workspace = max(part.activations for part in sums.parts.values())
    driver.set_memory(pipe.backend.before + sums.peak(memory) - arrays - workspace - 1)
    with pytest.raises(EngineError, match=r"need [0-9,]+ bytes of Host memory's memory, [0-9,]+ are free; load with "):
        load_and_generate(weighed, memory)


def load_and_generate(weighed, memory):
    for prompt in PROMPTS:
        generate(weighed("flux", memory), prompt)


def test_balanced_keeps_the_backbone_and_its_graph(weighed, driver):
    pipe = weighed("flux", "balanced", unloads=True)
    generate(pipe)
    generate(pipe)
    loads = len(pipe.backend.loads)
    assert sorted(pipe.backend.loads[:2]) == sorted(EVERY_IMAGE)
    for number, prompt in enumerate((PROMPTS[1], "a third prompt", PROMPTS[0])):
        generate(pipe, prompt)
        assert driver.calls("cuStreamBeginCapture") == 1
        assert driver.calls("cuGraphLaunch") == 2 + number
    encoders = ["text_encoder", "text_encoder_2", "conditioner"]
    assert pipe.backend.loads[loads:] == encoders * 2  # of the last prompt, states and modulation were cached


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
def test_threads(memory, weighed):
    """An image has the same bits whichever prompts other threads bring their encoders for."""
    pipe = weighed("flux", memory, unloads=True)
    prompts = [f"prompt {i}" for i in range(6)]
    alone = [generate(pipe, prompt) for prompt in prompts]
    pipe.clear_cache()
    with ThreadPoolExecutor(6) as pool:
        for number, found in enumerate(pool.map(lambda prompt: generate(pipe, prompt), prompts * 3)):
            np.testing.assert_array_equal(found, alone[number % len(prompts)])


def test_the_mode_follows_from_the_free_memory(weighed, driver, caplog):
    pipe = weighed("flux")
    assert (pipe.memory, caplog.text) == ("resident", "")
    memory = BundleMemory(
        pipe.bundle, TENSORRT, {p: pipe.backend.built_bytes(pipe.bundle, p) for p in weights_of(pipe.bundle.manifest)}
    )
    sums = memory.sums(usual_size(pipe.bundle.manifest))
    pipe.close()
    peaks = [sums.peak(mode) for mode in MODES]
    assert peaks == sorted(set(peaks), reverse=True)
    _, free, total = cuda.cuMemGetInfo()
    for mode, peak in zip(MODES, peaks, strict=True):
        for room, chosen in ((peak, mode), (peak - 1, MODES[min(MODES.index(mode) + 1, 2)])):
            driver.set_memory(total - free + room)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "arcflow"):
                made = weighed("flux")
            made.close()
            assert made.memory == chosen
            said = [r.message for r in caplog.records]
            assert len(said) == (chosen != "resident")
            assert all(text.startswith(f"memory={chosen!r}: an image of 1024 x 1024 px needs up to ") for text in said)
            assert all(("generate smaller images" in text) == (room < peaks[2]) for text in said)
