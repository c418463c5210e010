"""OpenVINO as an engine of the Python runtime, and the choice of a backend with "auto"."""

import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_bundle import edit_manifest, make_bundle
from small_graph import WEIGHT, bundle_with, edit_graph, write_graph

from arcflow_runtime import Pipeline, cli
from arcflow_runtime.backends import choose_backend, open_backend
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from arcflow_runtime.errors import EngineError, RequestError
from tests.conftest import FAMILIES, GOLDEN
from tests.test_golden import arguments, golden

openvino = pytest.importorskip("arcflow_runtime.engines.openvino", exc_type=EngineError)


@pytest.fixture
def root(tmp_path):
    root = make_bundle(tmp_path / "bundle")
    write_graph(root)
    return root


@pytest.fixture(scope="module")
def pipelines(bundles):
    return {f: Pipeline.load(bundles(f, opset=23, steps=(2, 4)), backend="openvino") for f in FAMILIES}


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", FAMILIES)
def test_golden_cases(pipelines, name, index):
    """The bounds are the contract of the golden cases; see test_golden.py."""
    case, reference = golden(name, index)
    steps = []
    out = pipelines[name](
        **arguments(case), output_type="numpy", callback_on_step_end=lambda _, x: steps.append(x.copy())
    )
    for i, latents in enumerate(steps):
        expected = reference[f"step{i}.latents"]
        assert np.abs(latents - expected).max() <= 1e-4 * np.abs(expected).max(), f"step {i}"
    assert np.abs(out.images - reference["image"].transpose(0, 2, 3, 1)).max() <= 1.5 / 255


def test_threads_that_share_a_pipeline_get_the_images_of_single_runs(pipelines):
    pipe = pipelines["flux-tiny"]

    def generate(seed: int) -> np.ndarray:
        return pipe("a red circle", 32, 32, seed=seed, output_type="latents").images

    alone = [generate(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for expected, got in zip(alone, pool.map(generate, range(8)), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["flux-tiny", pytest.param("qwen-tiny", marks=pytest.mark.slow)])
def test_a_reduced_precision_is_within_torchs_own_rounding(bundles, capsys, name, dtype):
    """The rule of `arcflow verify`, for the engine in place of the emulation."""
    bundle = bundles(name, opset=23, dtype=dtype)
    sources = ["--base", str(GOLDEN / name / "base"), "--adapter", str(GOLDEN / name / "adapter")]
    size = ["--width", "32", "--height", "48", "--prompt", "a red circle"]
    code = cli.main(["verify", str(bundle), *sources, *size, "--backend", "openvino", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert code == 0, [row for row in rows if not row["passed"]]
    assert max(row["error"] for row in rows if "means" in row["what"]) > 1e-4, "computed from float32 weights"


def test_runs_a_graph_with_weights_in_safetensors(root):
    engine = open_backend("openvino", threads=1).open(bundle_with(root), "p")
    x = np.ones((2, 3), np.float32)
    x.setflags(write=False)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], x @ WEIGHT)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"^p: the engine is closed; load the pipeline again$"):
        engine.run({"x": x})


def test_a_run_that_fails_names_the_part_and_the_shapes(root):
    engine = open_backend("openvino").open(bundle_with(root), "p")
    with pytest.raises(EngineError, match=r"^p: OpenVINO failed on inputs \{'x': 'float32\[2, 5\]'\}: "):
        engine.run({"x": np.ones((2, 5), np.float32)})
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], x @ WEIGHT)


def test_a_graph_that_openvino_does_not_take(root):
    edit_graph(root / "p.onnx", lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator"))
    with pytest.raises(EngineError, match=r"^p: OpenVINO cannot load p\.onnx: .*NoSuchOperator"):
        open_backend("openvino").open(bundle_with(root), "p")


def test_inputs_and_outputs_must_be_the_manifests(root):
    with pytest.raises(EngineError, match=r"^p: the inputs of p\.onnx must be \['x', 'z'\], as in the manifest, got "):
        open_backend("openvino").open(bundle_with(root, inputs=("x", "z")), "p")
    with pytest.raises(EngineError, match=r"^p: the outputs of p\.onnx must be \['q'\]"):
        open_backend("openvino").open(bundle_with(root, outputs=("q",)), "p")


def test_fp8_is_refused_before_anything_is_loaded(tmp_path):
    root = make_bundle(tmp_path / "b")
    quantization = {"format": "fp8_e4m3", "layers": ["layer"], "policy": "0" * 64, "scales": "0" * 64}
    edit_manifest(root, parts__backbone__quantization=quantization)
    message = (
        "backbone is quantised to FP8, which OpenVINO does not round correctly on a CPU; "
        "use the bundle that it was quantised from, or --backend onnxruntime"
    )
    with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
        open_backend("openvino").check(Bundle.open(root))


def test_calls_run_side_by_side_if_there_are_cores(pipelines):
    cores = os.cpu_count()
    bundle = pipelines["flux-tiny"].bundle
    for threads, streams, total in ((1, cores, cores), (cores, 1, cores)):
        model = open_backend("openvino", threads=threads).open(bundle, "vae_decoder")._model
        assert (model.get_property("NUM_STREAMS"), model.get_property("INFERENCE_NUM_THREADS")) == (streams, total)
    assert open_backend("openvino").open(bundle, "vae_decoder")._model.get_property("NUM_STREAMS") == 1


def test_threads():
    with pytest.raises(RequestError, match=r"^threads must be at least 1, got 0; leave it out to use every core$"):
        open_backend("openvino", threads=0)


def test_a_cpu_without_bfloat16_instructions_is_said(tmp_path, caplog):
    root = make_bundle(tmp_path / "b")
    edit_manifest(root, parts__backbone__precision="bfloat16")
    backend = open_backend("openvino")
    backend._capabilities = frozenset({"FP32", "INT8"})
    backend.check(Bundle.open(root))
    message = (
        "this CPU has no bfloat16 instructions, so OpenVINO computes backbone in float32, which is slower and needs "
        "more memory"
    )
    assert [r.message for r in caplog.records] == [message]


def test_without_openvino_the_error_says_what_to_install():
    code = "import sys; sys.modules['openvino'] = None\nfrom arcflow_runtime import Pipeline\n"
    code += "from arcflow_runtime.backends import open_backend\n"
    code += "try: open_backend('openvino')\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("EngineError the backend openvino needs openvino, which is not installed; run: pip ")
    assert "[openvino]" in done.stdout


class TestAuto:
    @pytest.fixture(autouse=True)
    def without_gpu(self, monkeypatch):
        monkeypatch.setattr("arcflow_runtime.backends.find_gpu", lambda: None)

    def test_float32_runs_on_onnxruntime(self, tmp_path, caplog):
        caplog.set_level(logging.INFO, "arcflow")
        assert isinstance(choose_backend(Bundle.open(make_bundle(tmp_path / "b"))), OnnxRuntimeBackend)
        assert [r.message for r in caplog.records] == ["backend: onnxruntime"]

    def test_bfloat16_runs_on_openvino(self, tmp_path):
        root = make_bundle(tmp_path / "b")
        edit_manifest(root, parts__backbone__precision="bfloat16")
        assert isinstance(choose_backend(Bundle.open(root)), openvino.OpenVinoBackend)

    def test_what_no_backend_runs_is_refused_with_every_reason(self, tmp_path, monkeypatch):
        root = make_bundle(tmp_path / "b")
        edit_manifest(root, parts__backbone__precision="bfloat16")
        monkeypatch.setitem(sys.modules, "arcflow_runtime.engines.openvino", None)
        with pytest.raises(EngineError) as error:
            choose_backend(Bundle.open(root))
        assert str(error.value).startswith("no backend can run this bundle here: openvino: ")
        assert "; onnxruntime: backbone is in bfloat16, which ONNX Runtime cannot run on a CPU" in str(error.value)

    def test_a_gpu_comes_first_and_a_number_of_threads_means_the_cpu(self, tmp_path, monkeypatch):
        bundle = Bundle.open(make_bundle(tmp_path / "b"))
        tried = []

        def opened(name, threads=None):
            tried.append((name, threads))
            raise EngineError("not here")

        monkeypatch.setattr("arcflow_runtime.backends.find_gpu", object)
        monkeypatch.setattr("arcflow_runtime.backends.open_backend", opened)
        for threads in (None, 1):
            with pytest.raises(EngineError, match="no backend"):
                choose_backend(bundle, threads)
        cpu = ("onnxruntime", "openvino")
        assert tried == [
            *((name, None) for name in ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda", *cpu)),
            *((name, 1) for name in cpu),
        ]


def test_ctrl_c_after_another_thread_has_closed_the_pipeline(bundles):
    """OpenVINO's alternate signal stack must not be gone by then."""
    code = (
        "import faulthandler, gc, os, signal, sys, threading, time\n"
        "from arcflow_runtime import Pipeline\n"
        "faulthandler.enable()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "pipes = [Pipeline.load(sys.argv[1], backend='openvino')]\n"
        "def close():\n"
        "    pipes.pop().close()\n"
        "    gc.collect()\n"
        "thread = threading.Thread(target=close)\n"
        "thread.start()\n"
        "thread.join()\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(20)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, bundles("flux-tiny")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (1, ["interrupted"]), done.stderr
