"""Images of a bundle from each library that runs engines on this GPU, compared with ONNX Runtime on the CPU.

The bundle must be in float32 at opset 20, because TensorRT has no float32 kernels for attention as one operator. The
environment variable ARCFLOW_GPU_BUNDLE names one, made on any machine with

    arcflow export --base models/shapes/teacher --adapter models/shapes/adapter --dtype float32 --opset 20 --out BUNDLE

Without it, the bundle is exported here, which needs the exporter's packages.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.tensorrt_library import LIBRARIES

pytestmark = pytest.mark.gpu
SHAPES = Path(__file__).resolve().parent.parent.parent / "models" / "shapes"
SIZE = {"height": 64, "width": 64, "seed": 1, "output_type": "latents"}


def obstacle(name, device):
    """Why the backend `name` is not for this machine, or None."""
    if device.name == "Host memory":
        return "the driver made of host memory runs only this project's kernels"
    if importlib.util.find_spec("onnxruntime") is None:
        return "needs onnxruntime, for the images to compare with"
    if name == "onnxruntime-cuda":
        import onnxruntime as ort

        if "CUDAExecutionProvider" not in ort.get_available_providers():
            return f"onnxruntime {ort.__version__} has no CUDA provider; install onnxruntime-gpu in its place"
        return None
    library, gpu = LIBRARIES[name], find_gpu()
    if importlib.util.find_spec(library.module) is None:
        return f"{library.module} is not installed"
    assert gpu is not None, "the fixture `device` skips without a GPU"
    if library.targets and gpu.target not in library.targets:
        return f"{name} does not build for {gpu.target}"
    return None


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The bundle's folder. A failed export is an error."""
    if named := os.environ.get("ARCFLOW_GPU_BUNDLE"):
        return Path(named)
    for package in ("torch", "diffusers", "transformers", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs a bundle: set ARCFLOW_GPU_BUNDLE, or install {package} to export one here")
    from arcflow_runtime import cli

    folder = tmp_path_factory.mktemp("export") / "bundle"
    arguments = ["--base", SHAPES / "teacher", "--adapter", SHAPES / "adapter", "--out", folder]
    arguments += ["--dtype", "float32", "--opset", 20, "--max-px", 64, "--max-sequence-length", 12]
    assert cli.main(["export", *map(str, arguments)]) == 0
    return folder


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt", "onnxruntime-cuda"])
def test_images(name, device, request, tmp_path):
    """Within 1e-3 of ONNX Runtime on the CPU, in float32: another order of summation through two calls; and a graph
    gives the very bits of plain enqueues."""
    if (why := obstacle(name, device)) is not None:
        pytest.skip(why)
    from arcflow_runtime import Pipeline, cli

    bundle = shutil.copytree(request.getfixturevalue("exported"), tmp_path / "bundle")
    if name in LIBRARIES:
        assert cli.main(["build", str(bundle), "--backend", name]) == 0
    with Pipeline.load(bundle) as plain:
        expected = plain("a red circle", **SIZE).images
    with Pipeline.load(bundle, backend=name) as pipe:
        first, second, third = (pipe("a red circle", **SIZE).images for _ in range(3))
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)
