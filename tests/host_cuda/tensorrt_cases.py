"""TensorRT engines on the driver made of host memory, with `tensorrt_bindings.py` in the place of the library."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from arcflow_runtime import BundleError, EngineError, cli
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.gpus import Gpu
from arcflow_runtime.gpu import onnxruntime_backend
from arcflow_runtime.gpu.cuda import open_device
from arcflow_runtime.gpu.onnxruntime_backend import OnnxRuntimeCudaBackend
from arcflow_runtime.gpu.tensorrt import TensorRTOptions
from arcflow_runtime.gpu.tensorrt_backend import TensorRTBackend
from arcflow_runtime.maths.noise import draw_latents
from tests.fake_bundle import list_files, write_manifest
from tests.host_cuda import tensorrt_bindings as bindings
from tests.host_cuda.control import Code
from tests.host_cuda.images import CLOSE, WITHOUT_GRAPH, attempt
from tests.host_cuda.tensorrt_engines import PROMPT, SIZE, build, expected
from tests.small_graph import edit_graph, set_external


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


@pytest.mark.parametrize("low_memory", [False, True])
def test_noise_that_is_given(root, pipeline, low_memory):
    """With the caller's noise the engines run one by one, with arrays on the host."""
    build(root)
    pipe = pipeline(root, low_memory=low_memory)
    noise = draw_latents(1, 1, 16, 4, 4, 2)
    found = pipe(PROMPT, **(SIZE | {"seed": None, "latents": noise})).images
    np.testing.assert_allclose(found, expected(root), **CLOSE)


def test_low_memory(root, pipeline, driver):
    build(root)
    pipe = pipeline(root, low_memory=True)
    np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    assert driver.calls("cuStreamBeginCapture") == 0


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
    build(root)
    for options, capturable, text in (
        ({"own_graphs": True}, True, "tensorrt-rtx captures its runs itself"),
        ({}, False, "tensorrt-rtx says that its work cannot be captured"),
    ):
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


def test_layers_are_timed(root, machine, tmp_path, monkeypatch, capsys):
    build(root)
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


# ONNX Runtime's CUDA provider, of which nothing but the absence can be tested without a GPU


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="the CUDA provider is installed")
def test_a_provider_that_cannot_be_loaded(open_bundle, on_gpu, monkeypatch, recwarn):
    """ONNX Runtime falls back to the CPU where CUDA's libraries are missing."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_backend, "find_gpu", lambda: Gpu("Host memory", "sm89"))
    text = r"^text_encoder: ONNX Runtime cannot load its CUDA provider; it needs CUDA's"
    with pytest.raises(EngineError, match=text):
        on_gpu(backend=OnnxRuntimeCudaBackend(open_device))
