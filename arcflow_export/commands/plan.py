"""Estimate time, peak memory and disk of every stage of `arcflow compile`, before anything runs.

The estimate uses the student's configs and the measured speed of this machine. Configs of checkpoints on the hub are
downloaded, but no weights. Takes the options of `arcflow compile`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from arcflow_export.commands.compile import add_job_arguments, read_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_job_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    job = read_job(args)
    from arcflow_export.commands.sources import quiet_libraries
    from arcflow_export.costs.costs import misfit
    from arcflow_export.costs.machine import measure
    from arcflow_export.pipeline.forecast import forecast

    quiet_libraries()
    folder = next(p for p in (job.out.absolute(), *job.out.absolute().parents) if p.is_dir())
    machine = measure(folder)
    costs = forecast(job, machine)
    stages = [dataclasses.asdict(cost) | {"note": misfit(cost, machine) or ""} for cost in costs]
    if args.json:
        print(json.dumps({"stages": stages, "machine": dataclasses.asdict(machine)}, indent=2))
    else:
        for cost in costs:
            print(cost.sentence())
            if (said := misfit(cost, machine)) is not None:
                print(f"  {said}")
    return 0
