"""ONNX Runtime's CUDA provider: its errors, and its engines on this CPU; the provider itself needs a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from arcflow_runtime import EngineError, Pipeline, RequestError
from arcflow_runtime.backends import open_backend
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Part, TensorSpec
from arcflow_runtime.gpu import onnxruntime_backend as onnxruntime_cuda
from arcflow_runtime.gpu.onnxruntime import OrtArrayEngine
from arcflow_runtime.gpu.onnxruntime_backend import OnnxRuntimeCudaBackend
from arcflow_runtime.maths.dtypes import cast, to_float32

without_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="the CUDA provider is installed"
)


@without_provider
def test_no_provider(bundles):
    with pytest.raises(EngineError) as error:
        Pipeline.load(bundles("flux-tiny"), backend="onnxruntime-cuda")
    assert str(error.value) == (
        f"the installed onnxruntime {ort.__version__} has no CUDA provider; "
        "run: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    )


def test_no_gpu(bundles, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime_cuda, "find_gpu", lambda: None)
    with pytest.raises(EngineError, match=r"^onnxruntime-cuda runs on an NVIDIA GPU, and the CUDA driver finds none"):
        Pipeline.load(bundles("flux-tiny"), backend="onnxruntime-cuda")


def test_threads_are_for_the_cpu():
    with pytest.raises(RequestError, match=r"^threads is for backends that run on a CPU, got 2 for onnxruntime-cuda"):
        open_backend("onnxruntime-cuda", 2)


def test_without_cuda_core_there_is_no_denoiser(bundles):
    backend = OnnxRuntimeCudaBackend(None)
    assert backend.open_denoiser(Bundle.open(bundles("flux-tiny")), None) is None


def test_arrays_in_bfloat16():
    """A cast to float32 and back: ONNX Runtime has CPU kernels for those."""
    value = onnx.helper.make_tensor_value_info
    bf16, f32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    given = [value("x", bf16, ["n"]), value("z", f32, ["n"])]
    made = [value("wide", f32, ["n"]), value("y", bf16, ["n"])]
    nodes = [onnx.helper.make_node("Cast", [a], [b], to=t) for a, b, t in (("x", "wide", f32), ("z", "y", bf16))]
    graph = onnx.helper.make_graph(nodes, "g", given, made)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = (TensorSpec("x", "bfloat16", ("n",)), TensorSpec("z", "float32", ("n",)))
    outputs = (TensorSpec("wide", "float32", ("n",)), TensorSpec("y", "bfloat16", ("n",)))
    engine = OrtArrayEngine("part", Part("g", "w", "bfloat16", 0, inputs, outputs), session)
    x = np.float32([1, -2.5, 3.140625, 1e30])
    found = engine.run({"x": cast(x, "bfloat16"), "z": x})
    assert found["y"].dtype == np.uint16
    np.testing.assert_array_equal(found["wide"], to_float32(cast(x, "bfloat16")))
    np.testing.assert_array_equal(found["y"], cast(x, "bfloat16"))
    with pytest.raises(EngineError, match=r"^part: ONNX Runtime failed on inputs {'x': 'uint16\[1, 4\]', 'z': "):
        engine.run({"x": cast(x, "bfloat16")[None], "z": x})
    engine.close()
    with pytest.raises(EngineError, match=r"^part: the engine is closed"):
        engine.run({"x": cast(x, "bfloat16"), "z": x})
