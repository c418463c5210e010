"""The backend "onnxruntime-cuda", for GPUs without TensorRT: a bundle's graphs -> engines and a denoiser.

With cuda-core installed, inputs and outputs stay on the device and the update kernel runs there. Without it, each
step's heads are copied to the host, which computes the update.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import onnxruntime as ort

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.quant_formats import check_runs
from arcflow_runtime.engines.base import Engine
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.modes import ONNX_RUNTIME_CUDA
from arcflow_runtime.engines.onnxruntime import open_session
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import EngineError, RequestError
from arcflow_runtime.gpu.denoiser import DeviceDenoiser
from arcflow_runtime.gpu.device import Device
from arcflow_runtime.gpu.engine import DeviceEngine
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.onnxruntime import OrtArrayEngine, OrtEngine

_PROVIDER = "CUDAExecutionProvider"


class OnnxRuntimeCudaBackend:
    """Loads parts with ONNX Runtime's CUDA provider, all on one GPU and in one stream."""

    memory_rules = ONNX_RUNTIME_CUDA

    def __init__(self, open_device: Callable[[], Device] | None) -> None:
        """Args: `open_device` is called when the device is first needed; None runs parts on host arrays instead."""
        self._open_device = open_device
        self._lane: Lane | None = None

    def check(self, bundle: Bundle) -> None:
        """Check that the CUDA provider and a GPU are present, and that no part is in NVFP4.

        Raises:
            EngineError: the installed package has no CUDA provider, there is no GPU, or a part is in NVFP4.
        """
        check_runs(bundle.manifest, "onnxruntime", "which ONNX Runtime cannot run")
        if _PROVIDER not in ort.get_available_providers():
            raise EngineError(
                f"the installed onnxruntime {ort.__version__} has no CUDA provider; "
                "run: pip uninstall onnxruntime && pip install onnxruntime-gpu"
            )
        if find_gpu() is None:
            raise EngineError(
                "onnxruntime-cuda runs on an NVIDIA GPU, and the CUDA driver finds none here; "
                "check that nvidia-smi lists one"
            )

    def open(self, bundle: Bundle, part: str) -> Engine:
        """Load a part.

        Raises:
            EngineError: the graph or the CUDA provider cannot be loaded.
        """
        spec = bundle.manifest.parts[part]
        if self._open_device is None:
            return OrtArrayEngine(part, spec, self._session(bundle, part, None))
        lane = self._get_lane(self._open_device)

        def load() -> DeviceEngine:
            with lane.enter() as stream:
                return OrtEngine(bundle.manifest, part, self._session(bundle, part, stream.handle), "cuda")

        return HostEngine(lane, bundle.manifest, part, load)

    def free_bytes(self) -> int | None:
        """Free memory of the GPU, or None without cuda-core; see `MeasuredBackend`."""
        return None if self._open_device is None else self._get_lane(self._open_device).free_bytes()

    def built_bytes(self, bundle: Bundle, part: str) -> None:
        """None: parts run without built engines."""

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> DeviceDenoiser | None:
        """The denoiser on the device, or None without cuda-core; see `DenoisingBackend`."""
        if self._open_device is None:
            return None
        return DeviceDenoiser(bundle, parts, self._get_lane(self._open_device), lambda part, shapes: None)

    def _session(self, bundle: Bundle, part: str, stream: int | None) -> ort.InferenceSession:
        # TF32 would round float32 bundles to 10 bits of mantissa. An exhaustive convolution search picks algorithms by
        # timing, which would make images depend on the first run.
        options = {"device_id": "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        if stream is not None:
            options["user_compute_stream"] = str(stream)
        session = open_session(bundle, part, ort.SessionOptions(), [(_PROVIDER, options), "CPUExecutionProvider"])
        if _PROVIDER not in session.get_providers():
            raise EngineError(
                f"{part}: ONNX Runtime cannot load its CUDA provider; it needs CUDA's and cuDNN's libraries, "
                "run: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return session

    def _get_lane(self, open_device: Callable[[], Device]) -> Lane:
        if self._lane is None:
            self._lane = Lane(open_device())
        return self._lane


def create(threads: int | None) -> OnnxRuntimeCudaBackend:
    """Create the backend.

    Raises:
        RequestError: `threads` is given; only backends on a CPU take it.
    """
    if threads is not None:
        raise RequestError(
            f"threads is for backends that run on a CPU, got {threads} for onnxruntime-cuda; leave it out"
        )
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return OnnxRuntimeCudaBackend(None)
    from arcflow_runtime.gpu.cuda import open_device

    return OnnxRuntimeCudaBackend(open_device)
