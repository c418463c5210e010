"""Check a compile job before its first stage, so that no later stage fails after hours."""

from __future__ import annotations

from importlib.util import find_spec

from arcflow_export.errors import ExportError
from arcflow_export.pipeline.stages import CALIBRATE, DTYPES, CompileJob, plan_stages
from arcflow_runtime.cli import check_usage
from arcflow_runtime.disk.quant_formats import BY_OPTION
from arcflow_runtime.errors import EngineError, RequestError

#: (module, package to install, stage that needs it or None for all) of the libraries that stages need.
_NEEDED = (("torch", "arcflow[export]", None), ("modelopt", "arcflow[calibrate]", CALIBRATE))


def check_job(job: CompileJob) -> None:
    """Check every stage's options, the policy, the target, and that the needed libraries are installed.

    Raises:
        RequestError: an option of a stage, or --target, is wrong.
        QuantizeError: the policy does not exist or is not valid.
        EngineError, ExportError: a library is missing.
    """
    stages = plan_stages(job, {})
    for stage in stages:
        check_usage(stage.command)
    for module, package, name in _NEEDED:
        if find_spec(module) is None and (name is None or any(s.name == name for s in stages)):
            raise ExportError(
                f"{name or 'arcflow compile'} needs {module}, which is not installed; run: pip install '{package}'"
            )
    if job.quantized is not None and (policy := job.chosen_policy) is not None:
        from arcflow_export.formats.policy import load_policy

        load_policy(policy)
    if job.backend != "onnxruntime":
        check_target(job)
    elif job.quantized is not None and not job.quantized.on_cpu:
        raise RequestError(
            f"--precision {job.precision} runs on GPUs only, got --backend onnxruntime; give --backend tensorrt-rtx "
            "and a --target, or --precision int8"
        )


def check_target(job: CompileJob) -> None:
    """Check that the library of the job's backend is installed and can build for its target.

    Raises:
        EngineError: it is not installed, or can build only where its GPU is.
        RequestError: it cannot build for the target, or the target cannot compute in the precision.
    """
    from arcflow_runtime.build.targets import capability, choose_targets, first_capability
    from arcflow_runtime.engines.gpus import find_gpu
    from arcflow_runtime.engines.tensorrt_library import LIBRARIES

    if job.quantized is not None and job.quantized.first_sm is None:
        raise RequestError(
            f"--precision {job.precision} is for CPUs, got --backend {job.backend}; leave --backend and --target out, "
            "or give --precision fp8"
        )
    library = LIBRARIES[job.backend]
    if find_spec(library.module) is None:
        raise EngineError(f"{library.name} is not installed; run: pip install '{library.package}'")
    given = [] if job.target is None else [t.strip() for t in job.target.split(",")]
    least = first_capability(DTYPES.get(job.precision, ""), [BY_OPTION[job.precision]] if job.quantized else [])
    for target in choose_targets(library, given, find_gpu()):
        if capability(target) < least:
            raise RequestError(f"--precision {job.precision} must be built for sm{least} or newer, got {target}")
