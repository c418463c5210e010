"""TensorRT engines on the driver made of host memory, with `tensorrt_bindings.py` in the place of the library.

One file, because each file of cases runs in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from arcflow_runtime import BundleError, EngineError, Pipeline, cli
from arcflow_runtime.build.profiles import make_profiles, parse_sizes
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import EngineKey, part_key_fields
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.engines import store
from arcflow_runtime.engines import tensorrt_library as library
from arcflow_runtime.engines.gpus import Gpu
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from arcflow_runtime.engines.store import BuildReport, locked_store, write_engine
from arcflow_runtime.gpu import onnxruntime_backend
from arcflow_runtime.gpu.cuda import open_device
from arcflow_runtime.gpu.lane import OutOfDeviceMemory
from arcflow_runtime.gpu.onnxruntime_backend import OnnxRuntimeCudaBackend
from arcflow_runtime.gpu.tensorrt import RESERVE_BYTES, TensorRTOptions
from arcflow_runtime.gpu.tensorrt_backend import TensorRTBackend
from arcflow_runtime.maths.noise import draw_latents
from tests.fake_bundle import list_files, write_manifest
from tests.host_cuda import tensorrt_bindings as bindings
from tests.host_cuda.control import Code, Live
from tests.host_cuda.images import CLOSE, WITHOUT_GRAPH, attempt
from tests.small_graph import edit_graph, set_external

SIZE = {"height": 32, "width": 32, "seed": 1, "output_type": "latents", "max_sequence_length": 16}
PROMPT = "a red circle"


@pytest.fixture
def root(tmp_path, open_bundle):
    shutil.copytree(open_bundle("flux").root, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def machine(monkeypatch):
    """A machine with the library and a GPU of sm89."""
    bindings.reset()
    changed = {n: replace(x, module=bindings.__name__) for n, x in library.LIBRARIES.items()}
    changed["tensorrt"] = replace(changed["tensorrt"], major=1)
    for module in (library, store, sys.modules["arcflow_runtime.gpu.tensorrt_backend"]):
        monkeypatch.setattr(module, "LIBRARIES", changed)
    monkeypatch.setattr(store, "find_gpu", lambda: Gpu("Host memory", "sm89"))


@pytest.fixture
def pipeline(machine, on_gpu, tmp_path):
    """A function (root, library's name, memory mode, **`TensorRTOptions`) -> pipeline."""

    def make(root, name="tensorrt-rtx", memory="resident", **options):
        backend = TensorRTBackend(name, open_device, TensorRTOptions(cache=tmp_path / "cache", **options))
        return on_gpu(Bundle.open(root), memory, backend)

    return make


def build(root, name="tensorrt-rtx", flags=(), sizes="16-64", batch=(1, 2), allocates=False, **changes):
    bundle = Bundle.open(root)
    with locked_store(bundle):
        for part in bundle.manifest.parts:
            key = EngineKey(
                **part_key_fields(bundle, part),
                profiles=make_profiles(bundle.manifest, part, parse_sizes(sizes), SizeRange(*batch)),
                flags=flags,
                optimization_level=None,
                workspace_bytes=None,
                **({"builder": name, "builder_version": "1.7.1", "target": "sm89"} | changes),
                gpu=None if name == "tensorrt-rtx" else "Host memory",
                platform=library.this_platform(),
            )
            graph = str(bundle.path(bundle.manifest.parts[part].graph))
            about = {"graph": graph, "stripped": "STRIP_PLAN" in flags, "streams": "WEIGHT_STREAMING" in flags}
            text, report = json.dumps(about).encode(), BuildReport(1.0, None, allocates)
            write_engine(bundle, key, lambda out, text=text, report=report: out.write(text) and report)


def expected(root, **arguments):
    with Pipeline(Bundle.open(root), OnnxRuntimeBackend(1)) as pipe:
        return pipe(PROMPT, **(SIZE | arguments)).images


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_images(root, pipeline, name, driver, monkeypatch):
    if name == "tensorrt":  # TensorRT 11 has no such function
        monkeypatch.delattr(bindings.IExecutionContext, "is_stream_capturable")
    build(root, name)
    pipe = pipeline(root, name)
    wanted = expected(root)
    for _ in range(3):
        np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, wanted, **CLOSE)
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 2)
    # One for each text encoder, and those of one plan: conditioner and backbone.
    assert bindings.state.contexts == 4
    driver.reset()
    pipe(PROMPT, **SIZE)
    launched = ["cuGraphLaunch", "cuEventCreate", "cuEventRecordWithFlags", "cuEventSynchronize", "cuEventDestroy"]
    assert [call for call in driver.log() if call != "cuEventElapsedTime"] == launched
    if name == "tensorrt-rtx":
        eager = bindings.DynamicShapesKernelSpecializationStrategy.EAGER
        assert {c.dynamic_shapes_kernel_specialization_strategy for c in bindings.state.configs} == {eager}
        disabled = bindings.CudaGraphStrategy.DISABLED
        assert {c.cuda_graph_strategy for c in bindings.state.configs} == {disabled}


def test_a_guided_straight_student(open_bundle, tmp_path, pipeline, driver):
    root = shutil.copytree(open_bundle("straight qwen").root, tmp_path / "straight")
    build(root)
    pipe = pipeline(root)
    guided = {"negative_prompt": "blurred", "num_inference_steps": 3, "max_sequence_length": 256}
    wanted = expected(root, **guided)
    for _ in range(3):
        np.testing.assert_allclose(pipe(PROMPT, **(SIZE | guided)).images, wanted, **CLOSE)
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 2)
    # The text encoder and the backbone have two each, for both lengths of text.
    assert bindings.state.contexts == 2 + 1 + 2


@pytest.mark.parametrize("memory", MODES)
def test_noise_that_is_given(root, pipeline, memory):
    """With the caller's noise the engines run one by one, with arrays on the host."""
    build(root)
    pipe = pipeline(root, memory=memory)
    noise = draw_latents(1, 1, 16, 4, 4, 2)
    found = pipe(PROMPT, **(SIZE | {"seed": None, "latents": noise})).images
    np.testing.assert_allclose(found, expected(root), **CLOSE)


def test_low_memory(root, pipeline, driver):
    build(root)
    pipe = pipeline(root, memory="low")
    np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    assert driver.calls("cuStreamBeginCapture") == 0


ENCODERS = ("text_encoder", "text_encoder_2", "conditioner")


@pytest.mark.parametrize(
    ("name", "flags", "unloads"),
    [("tensorrt-rtx", (), True), ("tensorrt", (), False), ("tensorrt-rtx", ("REFIT_IDENTICAL", "STRIP_PLAN"), False)],
    ids=["rtx", "tensorrt", "stripped"],
)
def test_balanced_unloads_weights_where_the_library_can(root, pipeline, name, flags, unloads):
    """A new prompt then loads weights into the engines that are there, and makes no context again."""
    build(root, name, flags=flags)
    pipe = pipeline(root, name, memory="balanced")
    weights = bindings.state.weights
    assert weights == []
    first = pipe(PROMPT, **SIZE).images
    np.testing.assert_allclose(first, expected(root), **CLOSE)
    made = bindings.state.contexts
    pipe("a blue square", **SIZE)
    np.testing.assert_array_equal(pipe(PROMPT, **SIZE).images, first)
    one = [(f"{part}.onnx", what) for part in ENCODERS for what in ("load", "unload")]
    assert weights == (one + one if unloads else [])
    assert bindings.state.contexts == made + (0 if unloads else len(ENCODERS))


def test_weights_that_cannot_be_loaded_again(root, pipeline):
    build(root)
    pipe = pipeline(root, memory="balanced")
    first = pipe(PROMPT, **SIZE).images
    bindings.state.log = "out of memory"
    with pytest.raises(OutOfDeviceMemory, match=r"^text_encoder: weights need [0-9,]+ bytes of Host memory's memory, "):
        pipe("a blue square", **SIZE)
    bindings.state.log = None
    pipe("a blue square", **SIZE)
    np.testing.assert_array_equal(pipe(PROMPT, **SIZE).images, first)


def test_stripped_engines_get_the_bundles_weights_before_they_run(root, pipeline):
    build(root, flags=("REFIT_IDENTICAL", "STRIP_PLAN"))
    pipe = pipeline(root)
    assert sorted(bindings.state.refits) == sorted(str(root / f"{p}.onnx") for p in pipe.bundle.manifest.parts)
    np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    bindings.state.missing = ["x.weight"]
    with pytest.raises(EngineError, match=r"text_encoder: tensorrt-rtx: text_encoder.safetensors lacks weights of the"):
        pipeline(root)
    bindings.state.refit_errors = ["no such initializer"]
    with pytest.raises(EngineError, match=r"text_encoder.safetensors does not fit the engine: no such initializer$"):
        pipeline(root)


def test_weights_from_elsewhere_are_not_filled_in(root, pipeline):
    manifest = Bundle.open(root).manifest
    edit_graph(root / "text_encoder.onnx", set_external("location", "../secret"))
    write_manifest(root, replace(manifest, files=list_files(root)))
    build(root, flags=("REFIT_IDENTICAL", "STRIP_PLAN"))
    with pytest.raises(
        BundleError, match=r"must lie in the part's weights text_encoder\.safetensors, got '\.\./secret'"
    ):
        pipeline(root)
    assert bindings.state.refits == []


def test_what_is_not_captured(root, pipeline, driver, caplog):
    for options, capturable, allocates, text in (
        ({"own_graphs": True}, True, False, "tensorrt-rtx captures its runs itself"),
        ({}, False, False, "tensorrt-rtx says that its work cannot be captured"),
        ({}, True, True, "it allocates memory in each run"),
    ):
        build(root, allocates=allocates)
        bindings.state.capturable = capturable
        caplog.clear()
        pipe = pipeline(root, **options)
        with caplog.at_level(logging.WARNING, "arcflow"):
            for _ in range(2):
                pipe(PROMPT, **SIZE)
        assert [r.message for r in caplog.records] == [f"{WITHOUT_GRAPH}backbone: {text}"]
        assert driver.calls("cuGraphLaunch") == 0
    own = bindings.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert bindings.state.configs[0].cuda_graph_strategy is own


def test_what_was_compiled_is_kept(root, pipeline, tmp_path):
    build(root)
    with pipeline(root) as pipe:
        pipe(PROMPT, **SIZE)
    files = sorted((tmp_path / "cache").glob("*.cache"))
    # Without the decoder, which latents do not need.
    assert [f.read_bytes() for f in files] == [b"compiled"] * 4
    files[0].write_bytes(b"of an earlier run")
    with pipeline(root) as pipe:
        pipe(PROMPT, **SIZE)
    assert files[0].read_bytes() == b"of an earlier run"
    assert sorted((tmp_path / "cache").glob("*.cache")) == files


def test_sizes_that_the_engine_does_not_take(root, pipeline):
    build(root, sizes="32x32", batch=(1, 1))
    pipe = pipeline(root)
    # An engine takes one image at a time, so they are generated one after the other.
    two = pipe(PROMPT, **(SIZE | {"seed": [1, 2]}), num_images_per_prompt=2).images
    wanted = expected(root, seed=[1, 2], num_images_per_prompt=2)
    np.testing.assert_allclose(two, wanted, **CLOSE)
    with pytest.raises(EngineError) as error:
        pipe(PROMPT, **(SIZE | {"width": 48}))
    assert str(error.value) == (
        "backbone: the engine takes latents from [1, 4, 64] to [1, 4, 64], got [1, 6, 64]; "
        f"run: arcflow build {root} --backend tensorrt-rtx --target sm89 --parts backbone "
        "with --resolutions and --batch that include it"
    )


def test_engines_for_another_machine_are_named_before_anything_is_loaded(root, pipeline, monkeypatch):
    with pytest.raises(EngineError) as error:
        pipeline(root)
    command = f"run: arcflow build {root} --backend tensorrt-rtx --target sm89 --parts text_encoder"
    assert str(error.value) == f"{root} has no engine for text_encoder; {command}"
    build(root, target="sm120")
    monkeypatch.setattr(bindings, "Runtime", None)
    with pytest.raises(EngineError) as error:
        pipeline(root)
    assert str(error.value) == f"text_encoder: the engine's compute capability must be sm89, got sm120; {command}"


def test_an_engine_that_cannot_be_loaded(root, pipeline):
    build(root)
    bindings.state.log = "Serialization assertion failed"
    with pytest.raises(EngineError, match=r"(?s)text_encoder: tensorrt-rtx: .*cannot be loaded; .*\n  Serialization"):
        pipeline(root)
    bindings.state.log = "an illegal memory access was encountered"
    with pytest.raises(EngineError, match=r"cannot be loaded; .*\n  an illegal memory access was encountered$"):
        pipeline(root)


def test_weights_that_do_not_fit(root, pipeline, driver):
    build(root)
    driver.fail("cuMemAlloc", 1, Code.OUT_OF_MEMORY)
    text = r"^text_encoder: weights need [0-9,]+ bytes of Host memory's memory, [0-9,]+ are free; "
    with pytest.raises(OutOfDeviceMemory, match=text):
        pipeline(root)


def test_an_engine_of_another_dtype_than_the_manifest(root, pipeline):
    build(root)
    bindings.state.outputs = {"pooled_projections": bindings.DataType.HALF}
    with pytest.raises(
        EngineError,
        match=r"^text_encoder: tensorrt-rtx: inputs and outputs must be input_ids INT64, pooled_projections FLOAT, "
        r"as in the manifest, got input_ids INT64, pooled_projections HALF; build the engine again",
    ):
        pipeline(root)


def test_a_run_that_fails_is_reported_with_what_the_library_said(root, pipeline):
    build(root)
    pipe = pipeline(root)
    bindings.state.failing = lambda graph: "illegal memory access"
    with pytest.raises(EngineError, match=r"^text_encoder: tensorrt-rtx: the run failed\n  illegal memory access$"):
        pipe(PROMPT, **SIZE)


def test_shapes_that_the_library_cannot_infer(root, pipeline, monkeypatch):
    build(root)
    pipe = pipeline(root)

    def raise_error(self):
        raise RuntimeError("shape inference failed")

    monkeypatch.setattr(bindings.IExecutionContext, "infer_shapes", raise_error)
    text = r"^text_encoder: tensorrt-rtx: the shapes cannot be inferred: shape inference failed$"
    with pytest.raises(EngineError, match=text):
        pipe(PROMPT, **SIZE)


def test_layers_are_timed(root, machine, driver, tmp_path, monkeypatch, capsys):
    build(root)
    before = driver.live(Live.DEVICE_BYTES)
    backend = TensorRTBackend("tensorrt-rtx", open_device, TensorRTOptions(cache=tmp_path / "cache"))
    monkeypatch.setattr("arcflow_runtime.commands.profile.open_backend", lambda name, threads: backend)
    arguments = ["--height", "32", "--width", "32", "--json", "--backend", "tensorrt-rtx"]
    assert cli.main(["profile", str(root), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {(r["part"], r["layer"], r["runs"], r["ms"]) for r in rows if r["part"] == "backbone"} == {
        ("backbone", "first", 2, 0.5),
        ("backbone", "second", 2, 0.5),
    }
    assert len(rows) == 10
    assert driver.live(Live.DEVICE_BYTES) == before


# Weight streaming

STREAMED = ("WEIGHT_STREAMING",)


def weights_of(bundle, *parts):
    """Bytes of the weights files of these parts, or of all."""
    m = bundle.manifest
    return sum(m.files[m.parts[part].weights].bytes for part in parts or m.parts)


def test_a_budget_of_more_than_31_bits(root, pipeline, driver):
    """The binding of the automatic budget returns 32 bits, so that 9.8 GB become 1.2 GB and 6.5 GB become -2.1 GB."""
    build(root, flags=STREAMED)
    bindings.state.streamable = 9_800_000_000
    driver.set_memory(30 << 30)
    bundle = pipeline(root).bundle
    reserve = (1 << 16) + 9_800_000_000 // 16 + RESERVE_BYTES  # activations, and the buffer to stream through
    free, left = (30 << 30) - reserve, weights_of(bundle)
    budgets = dict(set_budgets())
    assert list(budgets) == list(bundle.manifest.parts)
    for part, budget in budgets.items():
        # The stand-in allocates nothing for weights of this size, so all parts see the same free memory.
        assert budget == min(9_800_000_000, free * weights_of(bundle, part) // left), part
        left -= weights_of(bundle, part)
    assert max(budgets.values()) > 1 << 32


def set_budgets():
    """(part, budget) for each engine: the last that was set."""
    return list(dict(bindings.state.budgets).items())


@pytest.mark.parametrize("nbytes", [0, 1 << 20, RESERVE_BYTES])
def test_the_smallest_budget_streams_everything(nbytes, root, pipeline, driver):
    build(root, flags=STREAMED)
    bindings.state.streamable = 9_800_000_000
    driver.set_memory(nbytes)
    pipeline(root)
    assert [budget for _, budget in set_budgets()] == [0] * 5


def test_weights_that_fit_are_not_streamed(root, pipeline, driver, caplog):
    build(root, flags=STREAMED)
    pipe = pipeline(root)
    graphs = {part: (root / spec.graph).stat().st_size for part, spec in pipe.bundle.manifest.parts.items()}
    assert dict(set_budgets()) == graphs, "the stand-in takes the size of the graph for that of the weights"
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    assert (driver.calls("cuGraphLaunch"), caplog.records) == (2, [])


def test_streamed_weights_are_not_captured(root, pipeline, driver, caplog):
    build(root, flags=STREAMED)
    bindings.state.streamable = 9_800_000_000
    driver.set_memory(4 << 30)
    pipe = pipeline(root)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    text = f"{WITHOUT_GRAPH}backbone: its weights are streamed from the host"
    assert [r.message for r in caplog.records] == [text]
    assert driver.calls("cuGraphLaunch") == 0


def test_a_budget_that_is_not_accepted(root, pipeline, driver, monkeypatch):
    build(root, flags=STREAMED)
    driver.fail("cuMemAlloc", 1, Code.OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory, match=r"^text_encoder: weights need [0-9,]+ bytes of Host memory's memory, "):
        pipeline(root)
    ignored = property(lambda engine: -2_089_934_592, lambda engine, value: None)
    monkeypatch.setattr(bindings.ICudaEngine, "weight_streaming_budget_v2", ignored)
    text = r"^text_encoder: tensorrt-rtx: the budget for streamed weights must be [0-9,]+ bytes, got -2,089,934,592$"
    with pytest.raises(EngineError, match=text):
        pipeline(root)


# Memory that runs out inside the library

DROPPED = "out of GPU memory: the CUDA graphs of 1 other shapes are dropped"
#: What an engine that allocates when it runs takes.
RUN_BYTES = {"backbone": 4096}
#: A second plan's allocations, when the prompt is known: staged, constant and working buffers, one context each for
#: conditioner and backbone, and `RUN_BYTES` in each of two steps. The workspace is large enough.
SECOND_PLAN = 3 + 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "memory", "allocations"),
    [
        ({"width": 16}, "resident", SECOND_PLAN),
        # Also the text encoder's context, and its inputs and outputs.
        ({"max_sequence_length": 32}, "resident", SECOND_PLAN + 2),
        # Also weights and workspace of the backbone, but no context of the conditioner, whose result is cached.
        ({"width": 16}, "low", SECOND_PLAN + 1),
    ],
    ids=["size", "text", "low"],
)
def test_every_allocation_of_a_second_shape_may_fail(change, memory, allocations, root, pipeline, driver, caplog):
    """The other shape makes room for it, in buffers, contexts, runs and loaded weights."""
    build(root)
    wanted = expected(root, **change)
    for nth in itertools.count(1):
        bindings.state.run_bytes = RUN_BYTES
        pipe = pipeline(root, memory=memory)
        pipe(PROMPT, **SIZE)
        driver.fail("cuMemAlloc", nth, Code.OUT_OF_MEMORY)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "arcflow"):
            np.testing.assert_allclose(pipe(PROMPT, **(SIZE | change)).images, wanted, **CLOSE)
        reached = driver.pending_failures() == 0
        driver.reset()
        assert [r.message for r in caplog.records] == [DROPPED] * reached
        np.testing.assert_allclose(pipe(PROMPT, **(SIZE | change)).images, wanted, **CLOSE)
        pipe.close()
        if not reached:
            break
    assert nth - 1 == allocations


@pytest.mark.parametrize(
    ("nth", "text"),
    [
        (4, "backbone: tensorrt-rtx: an execution context cannot be created"),
        (SECOND_PLAN + 1, "backbone: tensorrt-rtx: the run failed"),  # the workspace is allocated too
    ],
    ids=["context", "run"],
)
def test_without_other_shapes_it_is_an_error(nth, text, root, pipeline, driver):
    build(root)
    bindings.state.run_bytes = RUN_BYTES
    pipe = pipeline(root)
    states, pooled = (pipe.bundle.manifest.parts[p].outputs[0].shape[-1] for p in ("text_encoder_2", "text_encoder"))
    embeds = {
        "prompt_embeds": np.zeros((1, 16, states), np.float32),
        "pooled_prompt_embeds": np.zeros((1, pooled), np.float32),
    }
    driver.fail("cuMemAlloc", nth, Code.OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory) as error:
        pipe(**embeds, **SIZE)
    first, *logged = str(error.value).splitlines()
    free = r"[0-9,]+ bytes of Host memory's memory are free"
    assert re.fullmatch(
        rf"{text} for lack of memory; {free}; load with memory='balanced' or 'low' \(--memory\), "
        "or generate fewer or smaller images at once",
        first,
    ), first
    assert "out of memory" in logged[0]
    pipe(**embeds, **SIZE)


@pytest.mark.parametrize(("step", "fails"), [(0, False), (1, True)])
def test_a_step_that_a_callback_has_seen_is_not_run_again(step, fails, root, pipeline, driver):
    build(root)
    bindings.state.run_bytes = RUN_BYTES
    pipe, seen = pipeline(root), []
    pipe(PROMPT, **SIZE)
    driver.fail("cuMemAlloc", SECOND_PLAN - 1 + step, Code.OUT_OF_MEMORY)
    request = SIZE | {"width": 16, "callback_on_step_end": lambda i, latents: seen.append(i)}
    if fails:
        with pytest.raises(OutOfDeviceMemory, match=r"^backbone: tensorrt-rtx: the run failed for lack of memory; "):
            pipe(PROMPT, **request)
    else:
        pipe(PROMPT, **request)
    assert seen == ([0] if fails else [0, 1])
    driver.reset()
    np.testing.assert_allclose(pipe(PROMPT, **(SIZE | {"width": 16})).images, expected(root, width=16), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("image", [1, 2], ids=["plain", "captured"])
def test_every_call_may_fail(image, root, pipeline, driver):
    """Those of this runtime and those of the library: an error that names the failure or a right image, then a right
    image."""
    build(root)
    pipe, wanted = pipeline(root), expected(root)

    def prepare():
        pipe(PROMPT, **SIZE)
        pipe._denoiser.make_room()
        for _ in range(image - 1):
            pipe(PROMPT, **SIZE)
        driver.reset()

    prepare()
    pipe(PROMPT, **SIZE)
    calls = sum(not re.search("Free|Destroy", name) for name in driver.log())
    for nth in range(1, calls + 1):
        prepare()
        driver.fail("*", nth, Code.UNKNOWN)
        failed = attempt(lambda: pipe(PROMPT, **SIZE).images, wanted)
        said = r"CUDA_ERROR_UNKNOWN|Failed to create|Cuda Runtime \(|profile 0 cannot be set"
        assert failed is None or re.search(said, failed), failed
        assert driver.pending_failures() == 0, f"call {nth} of {calls} was not made"
        np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, wanted, **CLOSE)


def test_an_engine_that_allocates_when_it_runs_is_not_captured(root, pipeline, driver, caplog):
    build(root)
    bindings.state.run_bytes = RUN_BYTES
    pipe, wanted = pipeline(root), expected(root)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, wanted, **CLOSE)
    (said,) = [r.message for r in caplog.records]
    assert said.startswith(f"{WITHOUT_GRAPH}the capture failed: backbone: tensorrt-rtx: the run failed\n"), said
    assert driver.calls("cuGraphLaunch") == 0


def test_a_launch_that_runs_out_of_memory(root, pipeline, driver, caplog):
    build(root)
    pipe, wanted = pipeline(root), expected(root)
    for width in (64, 32, 32):
        pipe(PROMPT, **(SIZE | {"width": width}))
    driver.fail("cuGraphLaunch", 1, Code.OUT_OF_MEMORY)
    with caplog.at_level(logging.WARNING, "arcflow"):
        np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, wanted, **CLOSE)
    assert [r.message for r in caplog.records] == [DROPPED]


# ONNX Runtime's CUDA provider, of which nothing but the absence can be tested without a GPU


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="the CUDA provider is installed")
def test_a_provider_that_cannot_be_loaded(open_bundle, on_gpu, monkeypatch, recwarn):
    """ONNX Runtime falls back to the CPU where CUDA's libraries are missing."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_backend, "find_gpu", lambda: Gpu("Host memory", "sm89"))
    text = r"^text_encoder: ONNX Runtime cannot load its CUDA provider; it needs CUDA's"
    with pytest.raises(EngineError, match=text):
        on_gpu(backend=OnnxRuntimeCudaBackend(open_device))
