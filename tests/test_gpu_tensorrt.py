"""TensorRT engines in the runtime, with a library that behaves like TensorRT-RTX and runs on this CPU."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
import sys
from dataclasses import replace

import fake_tensorrt
import numpy as np
import pytest
from fake_bundle import list_files, write_manifest
from host_device import HostDevice
from small_graph import edit_graph, set_external

from arcflow_runtime import BundleError, EngineError, Pipeline, RequestError, cli
from arcflow_runtime.backends import open_backend
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
from arcflow_runtime.gpu.tensorrt import TensorRTOptions
from arcflow_runtime.gpu.tensorrt_backend import TensorRTBackend
from arcflow_runtime.maths.noise import draw_latents

SIZE = {"height": 32, "width": 32, "seed": 1, "output_type": "latents", "max_sequence_length": 16}


@pytest.fixture
def root(tmp_path, bundles):
    shutil.copytree(bundles("flux-tiny"), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def machine(monkeypatch):
    """A machine with the library and a GPU of sm89."""
    fake_tensorrt.reset()
    changed = {n: replace(x, module="fake_tensorrt") for n, x in library.LIBRARIES.items()}
    changed["tensorrt"] = replace(changed["tensorrt"], major=1)
    for module in (library, store, sys.modules["arcflow_runtime.gpu.tensorrt_backend"]):
        monkeypatch.setattr(module, "LIBRARIES", changed)
    monkeypatch.setattr(store, "find_gpu", lambda: Gpu("Host 1", "sm89"))


@pytest.fixture
def pipeline(machine, tmp_path):
    made = []

    def make(root, name="tensorrt-rtx", device=None, memory=None, **options):
        device = device or HostDevice()
        backend = TensorRTBackend(name, lambda: device, TensorRTOptions(cache=tmp_path / "cache", **options))
        pipe = Pipeline(Bundle.open(root), backend, memory)
        pipe.device = device
        made.append(pipe)
        return pipe

    yield make
    for pipe in made:
        pipe.close()
        assert not pipe.device.live


def build(root, name="tensorrt-rtx", flags=(), sizes="16-64", batch=(1, 2), **changes):
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
                gpu=None if name == "tensorrt-rtx" else "Host 1",
                platform=library.this_platform(),
            )
            graph = str(bundle.path(bundle.manifest.parts[part].graph))
            about = json.dumps({"graph": graph, "stripped": "STRIP_PLAN" in flags}).encode()
            write_engine(bundle, key, lambda out, about=about: BuildReport(out.write(about)))


def expected(root, **arguments):
    with Pipeline(Bundle.open(root), OnnxRuntimeBackend(1)) as pipe:
        return pipe("a red circle", **(SIZE | arguments)).images


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_pictures(root, pipeline, name):
    build(root, name)
    pipe = pipeline(root, name)
    wanted = expected(root)
    for _ in range(3):
        np.testing.assert_allclose(pipe("a red circle", **SIZE).images, wanted, rtol=0, atol=2e-5)
    assert (pipe.device.captures, pipe.device.launches) == (1, 2)
    # each text encoder's context, and those of one plan: one per part and shape
    assert fake_tensorrt.state.contexts == 4
    if name == "tensorrt-rtx":
        eager = fake_tensorrt.DynamicShapesKernelSpecializationStrategy.EAGER
        assert {c.dynamic_shapes_kernel_specialization_strategy for c in fake_tensorrt.state.configs} == {eager}
        disabled = fake_tensorrt.CudaGraphStrategy.DISABLED
        assert {c.cuda_graph_strategy for c in fake_tensorrt.state.configs} == {disabled}


@pytest.mark.parametrize("memory", MODES)
def test_noise_that_is_given(root, pipeline, memory):
    """The device draws its noise itself; a caller's takes the engines' way one by one."""
    build(root)
    pipe = pipeline(root, memory=memory)
    noise = draw_latents(1, 1, 16, 4, 4, 2)
    drawn = pipe("a red circle", **(SIZE | {"seed": None, "latents": noise})).images
    np.testing.assert_allclose(drawn, expected(root), rtol=0, atol=2e-5)


def test_low_memory(root, pipeline):
    build(root)
    pipe = pipeline(root, memory="low")
    np.testing.assert_allclose(pipe("a red circle", **SIZE).images, expected(root), rtol=0, atol=2e-5)
    assert pipe.device.captures == 0


ENCODERS = ("text_encoder", "text_encoder_2", "conditioner")


@pytest.mark.parametrize(
    ("name", "flags", "unloads"),
    [("tensorrt-rtx", (), True), ("tensorrt", (), False), ("tensorrt-rtx", ("REFIT_IDENTICAL", "STRIP_PLAN"), False)],
)
def test_balanced_unloads_weights_where_the_library_can(root, pipeline, name, flags, unloads):
    """A new prompt then loads weights into the engines that are there, and makes no context again."""
    build(root, name, flags=flags)
    pipe = pipeline(root, name, memory="balanced")
    weights = fake_tensorrt.state.weights
    assert weights == []
    first = pipe("a red circle", **SIZE).images
    np.testing.assert_allclose(first, expected(root), rtol=0, atol=2e-5)
    made = fake_tensorrt.state.contexts
    pipe("a blue square", **SIZE)
    np.testing.assert_array_equal(pipe("a red circle", **SIZE).images, first)
    one = [(f"{part}.onnx", what) for part in ENCODERS for what in ("load", "unload")]
    assert weights == (one + one if unloads else [])
    assert fake_tensorrt.state.contexts == made + (0 if unloads else len(ENCODERS))


def test_weights_that_cannot_be_loaded_again(root, pipeline):
    build(root)
    pipe = pipeline(root, memory="balanced")
    pipe("a red circle", **SIZE)
    fake_tensorrt.state.log = "out of memory"
    with pytest.raises(EngineError, match=r"^text_encoder: weights need [0-9,]+ bytes of Host 1's memory, "):
        pipe("a blue square", **SIZE)
    fake_tensorrt.state.log = None
    np.testing.assert_array_equal(pipe("a red circle", **SIZE).images, pipe("a red circle", **SIZE).images)
    pipe("a blue square", **SIZE)


def test_stripped_engines_get_the_bundles_weights_before_they_run(root, pipeline):
    build(root, flags=("REFIT_IDENTICAL", "STRIP_PLAN"))
    pipe = pipeline(root)
    assert sorted(fake_tensorrt.state.refits) == sorted(str(root / f"{p}.onnx") for p in pipe.bundle.manifest.parts)
    np.testing.assert_allclose(pipe("a red circle", **SIZE).images, expected(root), rtol=0, atol=2e-5)
    fake_tensorrt.state.missing = ["x.weight"]
    with pytest.raises(EngineError, match=r"text_encoder: tensorrt-rtx: text_encoder.safetensors lacks weights of the"):
        pipeline(root)
    fake_tensorrt.state.refit_errors = ["no such initializer"]
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
    assert fake_tensorrt.state.refits == []


def test_streamed_weights_are_not_captured(root, pipeline, caplog):
    build(root, flags=("WEIGHT_STREAMING",))
    pipe = pipeline(root)
    assert fake_tensorrt.state.budgets == [12345] * 5
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            pipe("a red circle", **SIZE)
    text = "images are generated without a CUDA graph: backbone: its weights are streamed from the host"
    assert [r.message for r in caplog.records] == [text]


def test_what_else_is_not_captured(root, pipeline, caplog):
    build(root)
    for options, capturable, text in (
        ({"own_graphs": True}, True, "tensorrt-rtx captures its runs itself"),
        ({}, False, "tensorrt-rtx says that its work cannot be captured"),
    ):
        fake_tensorrt.state.capturable = capturable
        caplog.clear()
        pipe = pipeline(root, **options)
        with caplog.at_level(logging.WARNING, "arcflow"):
            for _ in range(2):
                pipe("a red circle", **SIZE)
        assert [r.message for r in caplog.records] == [f"images are generated without a CUDA graph: backbone: {text}"]
        assert pipe.device.launches == 0
    own = fake_tensorrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert fake_tensorrt.state.configs[0].cuda_graph_strategy is own


def test_what_was_compiled_is_kept(root, pipeline, tmp_path):
    build(root)
    with pipeline(root) as pipe:
        pipe("a red circle", **SIZE)
    files = sorted((tmp_path / "cache").glob("*.cache"))
    # without the decoder, which latents do not need
    assert [f.read_bytes() for f in files] == [b"compiled"] * 4
    files[0].write_bytes(b"of an earlier run")
    with pipeline(root) as pipe:
        pipe("a red circle", **SIZE)
    assert files[0].read_bytes() == b"of an earlier run"
    assert sorted((tmp_path / "cache").glob("*.cache")) == files


def test_sizes_that_the_engine_does_not_take(root, pipeline):
    build(root, sizes="32x32", batch=(1, 1))
    pipe = pipeline(root)
    # one after the other, where an engine takes one image at a time
    two = pipe("a red circle", **(SIZE | {"seed": [1, 2]}), num_images_per_prompt=2).images
    wanted = expected(root, seed=[1, 2], num_images_per_prompt=2)
    np.testing.assert_allclose(two, wanted, rtol=0, atol=2e-5)
    with pytest.raises(EngineError) as error:
        pipe("a red circle", **(SIZE | {"width": 48}))
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
    monkeypatch.setattr(fake_tensorrt, "Runtime", None)
    with pytest.raises(EngineError) as error:
        pipeline(root)
    assert str(error.value) == f"text_encoder: the engine's compute capability must be sm89, got sm120; {command}"


def test_an_engine_that_cannot_be_loaded(root, pipeline):
    build(root)
    fake_tensorrt.state.log = "Serialization assertion failed"
    with pytest.raises(EngineError, match=r"(?s)text_encoder: tensorrt-rtx: .*cannot be loaded; .*\n  Serialization"):
        pipeline(root)
    fake_tensorrt.state.log = "Cuda Runtime (out of memory)"
    with pytest.raises(EngineError, match=r"^text_encoder: weights need [0-9,]+ bytes of Host 1's memory, "):
        pipeline(root, device=HostDevice(capacity=1 << 20))


def test_an_engine_of_another_dtype_than_the_manifest(root, pipeline):
    build(root)
    fake_tensorrt.state.outputs = {"pooled_projections": fake_tensorrt.DataType.HALF}
    with pytest.raises(
        EngineError,
        match=r"^text_encoder: tensorrt-rtx: inputs and outputs must be input_ids INT64, pooled_projections FLOAT, "
        r"as in the manifest, got input_ids INT64, pooled_projections HALF; build the engine again",
    ):
        pipeline(root)


def test_a_run_that_fails_is_reported_with_what_the_library_said(root, pipeline, monkeypatch):
    build(root)
    pipe = pipeline(root)

    def fail(self, stream):
        self.engine.logger.log(fake_tensorrt.ILogger.ERROR, "illegal memory access")
        return False

    monkeypatch.setattr(fake_tensorrt.IExecutionContext, "execute_async_v3", fail)
    with pytest.raises(EngineError, match=r"^text_encoder: tensorrt-rtx: the run failed\n  illegal memory access$"):
        pipe("a red circle", **SIZE)


def test_layers_are_timed(root, machine, tmp_path, monkeypatch, capsys):
    build(root)
    backend = TensorRTBackend("tensorrt-rtx", HostDevice, TensorRTOptions(cache=tmp_path / "cache"))
    monkeypatch.setattr("arcflow_runtime.commands.profile.open_backend", lambda name, threads: backend)
    arguments = ["--height", "32", "--width", "32", "--json", "--backend", "tensorrt-rtx"]
    assert cli.main(["profile", str(root), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert {(r["part"], r["layer"], r["runs"], r["ms"]) for r in rows if r["part"] == "backbone"} == {
        ("backbone", "first", 2, 0.5),
        ("backbone", "second", 2, 0.5),
    }
    assert len(rows) == 10


def test_no_gpu_and_no_library_are_errors_before_anything_else(root, monkeypatch):
    monkeypatch.setattr(store, "find_gpu", lambda: None)
    for name in ("tensorrt", "tensorrt-rtx"):
        monkeypatch.setitem(sys.modules, library.LIBRARIES[name].module, None)
        with pytest.raises(EngineError, match=rf"^{name} is not installed; run: pip install '{name}>="):
            Pipeline.load(root, backend=name)
    with pytest.raises(RequestError, match=r"^threads is for backends that run on a CPU, got 2 for tensorrt-rtx"):
        open_backend("tensorrt-rtx", 2)


def test_no_gpu(root, machine, monkeypatch):
    monkeypatch.setattr(store, "find_gpu", lambda: None)
    text = (
        "tensorrt-rtx engines run on an NVIDIA GPU, and the CUDA driver finds none here; "
        "check that nvidia-smi lists one"
    )
    with pytest.raises(EngineError, match=f"^{re.escape(text)}$"):
        Pipeline.load(root, backend="tensorrt-rtx")


def test_the_real_library_has_what_is_used():
    """Every class, member and method of the stand-in exists in TensorRT-RTX 1.7, and takes as many arguments."""
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    for name, fake in vars(fake_tensorrt).items():
        if not inspect.isclass(fake) or fake.__module__ != "fake_tensorrt":
            continue
        found = getattr(real, name)
        for member in vars(fake):
            if not member.startswith("_") and not (name == "ICudaEngine" and member in ("graph",)):
                assert hasattr(found, member), f"{name}.{member}"
    for name in ("report_layer_time",):
        assert hasattr(real.IProfiler, name)
    assert hasattr(real.ParserError, "desc")
