"""Check a compile job before its first stage, so that no later stage fails after hours."""

from __future__ import annotations

from importlib.util import find_spec

from arcflow_export.errors import ExportError
from arcflow_export.pipeline.stages import CALIBRATE, CompileJob, plan_stages
from arcflow_runtime.cli import check_usage
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
    if job.precision == "fp8" and (policy := job.policy or job.student.policy) is not None:
        from arcflow_export.formats.policy import load_policy

        load_policy(policy)
    if job.backend != "onnxruntime":
        check_target(job)


def check_target(job: CompileJob) -> None:
    """Check that the library of the job's backend is installed and can build for its target.

    Raises:
        EngineError: it is not installed, or can build only where its GPU is.
        RequestError: it cannot build for the target, or the target cannot compute in the precision.
    """
    from arcflow_runtime.build.plan import FIRST_WITH_BFLOAT16, FIRST_WITH_FP8
    from arcflow_runtime.engines.gpus import find_gpu
    from arcflow_runtime.engines.tensorrt_library import LIBRARIES

    library, gpu = LIBRARIES[job.backend], find_gpu()
    if find_spec(library.module) is None:
        raise EngineError(f"{library.name} is not installed; run: pip install '{library.package}'")
    if gpu is None and not library.ahead_of_time:
        raise EngineError(
            f"{job.backend} must build on the GPU that it builds for, but the CUDA driver finds none here; "
            "build on a machine with that GPU, or use --backend tensorrt-rtx, which needs no GPU"
        )
    if job.target is None and gpu is None:
        raise RequestError("--target must be given, such as --target sm89, because there is no GPU here")
    targets = [t.strip() for t in job.target.split(",")] if job.target is not None else [gpu.target] if gpu else []
    for target in targets:
        if library.ahead_of_time:
            library.check_target(target)
        elif gpu is not None and target != gpu.target:
            raise RequestError(f"--target must be {gpu.target} for {job.backend} on this {gpu.name}, got {target!r}")
        capability = int(target.removeprefix("sm"))
        least = {"fp8": FIRST_WITH_FP8, "bf16": FIRST_WITH_BFLOAT16}.get(job.precision, 0)
        if capability < least:
            raise RequestError(f"--precision {job.precision} must be built for sm{least} or newer, got {target}")
