"""Check this machine for generating images, or for compiling a student, and say what to do about what is missing.

Without STUDENT, the command checks Python, memory, disk, the GPU, its driver and the libraries that run bundles. With
STUDENT and options of `arcflow compile`, it also checks the hub, the licence, and the libraries, memory and disk of
every stage, and says how long the stages took elsewhere. The exit code is 1 if a check fails. No extra is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from arcflow_export.commands.compile import BACKENDS, add_job_arguments
from arcflow_runtime.backends import choices

if TYPE_CHECKING:
    from arcflow_export.doctor.findings import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_job_arguments(parser, choices())
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Check, and print a line for every check."""
    from arcflow_export.doctor.findings import report
    from arcflow_export.doctor.machine import check_machine, existing

    job = args.student is not None or args.base is not None
    findings = check_machine(existing(args.out), "auto" if job else args.backend)
    if job:
        findings += _check_student(args)
    failed = sum(f.state == "fail" for f in findings)
    if args.json:
        print(json.dumps({"findings": [dataclasses.asdict(f) for f in findings], "failed": failed}, indent=2))
    else:
        print(report(findings))
        print(f"\n{failed} of {len(findings)} checks failed" if failed else "\nno check failed")
    return 1 if failed else 0


def _check_student(args: argparse.Namespace) -> list[Finding]:
    from arcflow_export.doctor.findings import Finding, failure
    from arcflow_runtime.errors import ArcFlowError, RequestError
    from arcflow_runtime.installing import command_for_extra

    if args.backend not in BACKENDS:
        raise RequestError(f"--backend must be one of {', '.join(BACKENDS)} with a student, got {args.backend!r}")
    try:
        from arcflow_export.commands.compile import read_job
        from arcflow_export.commands.sources import quiet_libraries
        from arcflow_export.doctor.job import check_job

        return check_job(read_job(args), quiet_libraries)
    except ModuleNotFoundError as e:  # tomli on Python 3.10, without which no student file can be read
        if (e.name or "").startswith("arcflow"):
            raise
        return [Finding("job", "fail", f"{e.name} is not installed", f"run: {command_for_extra('export')}")]
    except ArcFlowError as e:
        return [failure("job", str(e))]
