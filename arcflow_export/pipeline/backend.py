"""Choose what `arcflow compile --backend auto` builds for: target, precision and the GPU here -> a backend."""

from __future__ import annotations

from importlib.util import find_spec

from arcflow_export.pipeline.stages import Backend, CompileJob
from arcflow_runtime.disk.quant_formats import BY_OPTION, FORMATS
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.tensorrt_library import LIBRARIES
from arcflow_runtime.errors import RequestError


def choose_backend(target: str | None, precision: str) -> Backend:
    """The backend for the targets, or else for the GPU here, or else for this CPU.

    TensorRT-RTX is chosen for every GPU that it supports, and TensorRT for the others. TensorRT is also chosen for the
    GPU here if it alone is installed.

    Args:
        target: compute capabilities such as "sm89,sm120"; None means the GPU here.
        precision: of the student.

    Raises:
        RequestError: no library can build for the targets here; or there is no target and no GPU, and a CPU cannot run
            the precision.
    """
    if precision in BY_OPTION and FORMATS[BY_OPTION[precision]].first_sm is None:
        if target is not None:
            raise RequestError(f"--precision {precision} is for CPUs, got --target {target}; leave --target out")
        return "onnxruntime"
    gpu, rtx = find_gpu(), LIBRARIES["tensorrt-rtx"]
    if target is None and gpu is None:
        if precision in BY_OPTION and not FORMATS[BY_OPTION[precision]].on_cpu:
            raise RequestError(
                f"--precision {precision} runs on GPUs only and there is none here: give the GPU to build for, such as "
                "--target sm120 for RTX 50 cards (with make: TARGET=sm120), or --precision int8 for this CPU"
            )
        if precision == "bf16":
            raise RequestError(
                "there is no GPU here, and ONNX Runtime has no bf16 on a CPU: give the GPU to build for, such as "
                "--target sm89 for RTX 40 cards (with make: TARGET=sm89), or --precision fp32 for this CPU"
            )
        return "onnxruntime"
    targets = {t.strip() for t in target.split(",")} if target is not None else set()
    if gpu is not None and targets <= {gpu.target}:
        only_tensorrt = find_spec(rtx.module) is None and find_spec(LIBRARIES["tensorrt"].module) is not None
        return "tensorrt" if only_tensorrt or gpu.target not in rtx.targets else "tensorrt-rtx"
    if others := sorted(targets - set(rtx.targets)):
        raise RequestError(
            f"--target must be among {', '.join(rtx.targets)} for a GPU that is not here, got {', '.join(others)}; "
            "run the command on a machine with that GPU, where TensorRT builds for it"
        )
    return "tensorrt-rtx"


def next_step(job: CompileJob, chosen: bool) -> str:
    """One sentence: what was made, and the command that uses it.

    Args:
        job: a job that is done.
        chosen: True if its backend was chosen by `choose_backend`.
    """
    bundle = job.result.path
    generate = f'arcflow generate {bundle} "a prompt"'
    if job.backend == "onnxruntime":
        if job.precision == "bf16":
            return f"{bundle} has no engines, and no CPU runs it; next: arcflow build {bundle} --backend tensorrt-rtx"
        chosen = chosen and (job.quantized is None or job.quantized.first_sm is not None)
        why = ", because there is no GPU here and no --target was given" if chosen else ""
        return f"{bundle} is for CPUs{why}; next: {generate}"
    gpu = find_gpu()
    target = job.target or (gpu.target if gpu is not None else "")
    here = gpu is not None and gpu.target in target.split(",")
    where = "next" if here else "next, on a machine with such a GPU"
    return f"{bundle} has engines of {job.backend} for {target}; {where}: {generate} --backend {job.backend}"
