"""Compile a student: download, export, calibrate, quantise, verify and build, skipping the stages that are done.

STUDENT is flux or qwen, a base without an adapter (flux-dev, flux-schnell, qwen-image), or a TOML file that names the
base, the adapter if there is one, and the options of each stage. --base compiles any base without an adapter. Every
stage runs in its own process. If the command is stopped, run it again: it continues and repeats no finished stage. A
stage whose inputs or options have changed runs again. The plan is printed first, and what each stage took is printed at
the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcflow_export.pipeline.stages import CompileJob

AUTO = "auto"
BACKENDS = (AUTO, "onnxruntime", "tensorrt-rtx", "tensorrt")
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "nvfp4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_job_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--json", action="store_true", help="print the plan, and what each stage took, as JSON")


def add_job_arguments(parser: argparse.ArgumentParser, backends: Sequence[str] = BACKENDS) -> None:
    """Declare the arguments that describe the job; `arcflow plan` and `arcflow doctor` take them too.

    Args:
        parser: gets the arguments.
        backends: what --backend accepts.
    """
    parser.add_argument(
        "student",
        metavar="STUDENT",
        nargs="?",
        help="flux, qwen, flux-dev, flux-schnell, qwen-image or a .toml file",
    )
    parser.add_argument(
        "--base", metavar="DIR|ID", help="in place of STUDENT: this base itself, without an adapter, in bf16"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the student's")
    parser.add_argument(
        "--backend",
        choices=backends,
        default=AUTO,
        help="what to build for; auto: TensorRT-RTX or TensorRT for --target or the GPU here, or else ONNX Runtime on "
        "this CPU (default: %(default)s)",
    )
    parser.add_argument("--target", metavar="SM[,SM...]", help="as of arcflow build (default: the GPU here)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out"),
        metavar="FOLDER",
        help="folder for NAME-PRECISION, NAME-scales.json and NAME-drift; default: %(default)s",
    )
    group = parser.add_argument_group("FP8, int8 and NVFP4")
    group.add_argument("--policy", metavar="NAME|FILE", help="which layers are quantised, and the gate's thresholds")
    group.add_argument(
        "--scales", type=Path, metavar="FILE", help="FP8 and NVFP4: scales of a calibration; written if missing"
    )
    group.add_argument("--no-gate", action="store_true", help="skip the drift gate")
    group.add_argument("--device", choices=("cpu", "cuda"), help="for calibration; default: the GPU if torch has one")
    group.add_argument("--limit", type=int, metavar="N", help="number of prompts for calibration and for the gate")
    group.add_argument("--size", type=_size, metavar="HEIGHTxWIDTH", help="image size for calibration and gate, in px")
    parser.add_argument("--offline", action="store_true", help="use the hub's cache only")
    parser.add_argument("--anyway", action="store_true", help="start even if a stage does not fit in memory or on disk")


def run(args: argparse.Namespace) -> int:
    """Compile."""
    from arcflow_export.pipeline.backend import next_step
    from arcflow_export.pipeline.check import check_job
    from arcflow_export.pipeline.run import CompileRun

    job = read_job(args)
    check_job(job)

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    task, code = CompileRun(job, say, args.json), 0
    if args.dry_run:
        task.plan(job_arguments(args, job))
    else:
        code = task.compile(job_arguments(args, job))
        if code == 0:
            say("\n" + next_step(job, args.backend == AUTO))
    if args.json:
        print(json.dumps(task.as_dict() | {"exit_code": code}, indent=2))
    return code


def read_job(args: argparse.Namespace) -> CompileJob:
    """The job that the options of `add_job_arguments` describe, with the backend that "auto" stands for.

    Raises:
        RequestError: an option is out of range, or "auto" finds nothing to build for.
        SourceError: the student file is missing or not valid.
    """
    from arcflow_export.pipeline.backend import choose_backend
    from arcflow_export.pipeline.stages import CompileJob
    from arcflow_export.pipeline.students import base_student, load_student_file
    from arcflow_runtime.errors import RequestError

    if args.limit is not None and args.limit < 1:
        raise RequestError(f"--limit must be at least 1, got {args.limit}")
    if (args.student is None) == (args.base is None):
        raise RequestError("give either STUDENT or --base, such as: arcflow compile flux, or --base DIR")
    student = load_student_file(args.student) if args.base is None else base_student(args.base)
    precision = args.precision or student.precision
    return CompileJob(
        student,
        args.out,
        precision,
        choose_backend(args.target, precision) if args.backend == AUTO else args.backend,
        args.target,
        args.policy,
        args.scales,
        not args.no_gate,
        args.offline,
        args.device,
        args.limit,
        args.size,
        args.anyway,
    )


def job_arguments(args: argparse.Namespace, job: CompileJob) -> list[str]:
    """The options that `read_job` reads, as command-line words, with the job's backend."""
    words = ["--base", args.base] if args.student is None else [args.student]
    words += ["--backend", job.backend, "--out", str(args.out)]
    for name in ("precision", "target", "policy", "scales", "device", "limit"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    if args.size is not None:
        words += ["--size", "x".join(map(str, args.size))]
    return words + [f"--{n}" for n in ("no-gate", "offline", "anyway") if getattr(args, n.replace("-", "_"))]


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(n) for n in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 1024x1024, got {text!r}") from None
    if height < 16 or width < 16 or height % 16 or width % 16:
        raise argparse.ArgumentTypeError(f"sides must be positive multiples of 16, got {text!r}")
    return height, width
