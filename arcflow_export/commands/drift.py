"""`arcflow verify --against`: compare two bundles -> tables, a report, and exit code 1 if a threshold does not hold."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_export.commands.announce import add_anyway, announce
from arcflow_export.commands.straight import negative_prompt
from arcflow_export.drift.cases import LIMIT, LIMIT_WITH_JUDGE
from arcflow_export.errors import ExportError
from arcflow_export.families import facts
from arcflow_export.progress import stage_bars
from arcflow_runtime.backends import choices
from arcflow_runtime.disk.outputs import check_file
from arcflow_runtime.disk.quant_formats import FORMATS
from arcflow_runtime.errors import RequestError

if TYPE_CHECKING:
    from arcflow_export.drift.compare import ShownImages
    from arcflow_export.drift.report import DriftReport
    from arcflow_runtime.disk.manifest import Manifest

_GENERAL, _SHAPES = "general", "shapes"


def add_drift_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that go with --against."""
    group = parser.add_argument_group("against another bundle")
    group.add_argument("--against", type=Path, metavar="BUNDLE", help="an unquantised bundle of the same student")
    add_anyway(parser)
    group.add_argument("--report", type=Path, metavar="DIR", help="write tables, plot and contact sheet to DIR")
    group.add_argument(
        "--prompts",
        metavar="NAME|FILE",
        help=f"{_GENERAL}, {_SHAPES}, or a file with one per line; default: {_GENERAL}, with --judge {_SHAPES}",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help=f"number of prompts; default: {LIMIT}, with --judge {LIMIT_WITH_JUDGE}"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the first prompt's noise; default: %(default)s")
    group.add_argument("--judge", type=Path, metavar="DIR", help="judge of shapes, such as models/shapes/judge")
    group.add_argument(
        "--policy",
        metavar="NAME|FILE",
        help=f"preset or .toml file with [thresholds]; default: the family's preset for the format, with "
        f"--judge that of {_SHAPES}",
    )
    group.add_argument(
        "--backend",
        choices=choices(),
        help="generate the bundle's images with its engines on this machine; default: with its graphs on the CPU",
    )
    group.add_argument(
        "--sensitivity",
        choices=("none", "blocks", "layers"),
        default="none",
        help="test each block or layer alone and left out, and suggest which to exclude; default: %(default)s",
    )


def _option(manifest: Manifest) -> str | None:
    """The format of the first quantised part, by its name on the command line; None if no part is quantised."""
    used = [part.quantization.format for part in manifest.parts.values() if part.quantization is not None]
    return FORMATS[used[0]].option if used else None


def run_drift(args: argparse.Namespace) -> int:
    """Compare the bundles, print and write the result; returns 1 if a threshold does not hold."""
    from arcflow_export.drift.cases import ImageSettings, read_cases
    from arcflow_export.drift.comparable import check_comparable
    from arcflow_export.drift.write_report import check_report
    from arcflow_export.formats.policy import load_policy, preset_for
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.generate.request import check_request

    if args.report is not None:
        check_report(args.report)
    if args.json not in (None, "-"):
        check_file(Path(args.json), "--json", ExportError)
    candidate, reference = Bundle.open(args.bundle), Bundle.open(args.against)
    check_comparable(candidate, reference)
    preset = _SHAPES if args.judge else facts(candidate.manifest.family).policy
    policy = load_policy(args.policy or preset_for(preset, _option(candidate.manifest)))
    scenes = []
    for bundle in (candidate, reference):
        request = check_request(
            bundle.manifest,
            "",
            args.height,
            args.width,
            args.steps,
            None,
            args.seed,
            1,
            None,
            "latents",
            negative_prompt=negative_prompt(args, bundle.manifest),
            true_cfg_scale=args.true_cfg_scale,
        )
        negatives = request.negative_prompts
        scenes.append(
            ImageSettings(
                request.height_px,
                request.width_px,
                request.num_inference_steps,
                request.guidance_scale,
                request.max_sequence_length,
                None if negatives is None else negatives[0],
                1.0 if negatives is None else request.true_cfg_scale,
            )
        )
    if scenes[0] != scenes[1]:
        sizes = " and ".join(f"{s.width_px}x{s.height_px}" for s in scenes)
        raise RequestError(f"the default sizes of the bundles differ, {sizes}; give --height and --width")
    name = args.prompts or (_SHAPES if args.judge else _GENERAL)
    limit = args.limit if args.limit is not None else (LIMIT_WITH_JUDGE if args.judge else LIMIT)
    from arcflow_export.commands.sources import quiet_libraries
    from arcflow_export.costs.costs import gate_cost
    from arcflow_export.drift.compare import DriftPlan, compare
    from arcflow_export.drift.cost import gate_work
    from arcflow_export.drift.engines import Engines

    quiet_libraries()
    cases = read_cases(name, limit, args.seed)
    parts, gate = gate_work(candidate, reference, scenes[0], len(cases), args.backend is None)
    folder = Path.cwd() if args.report is None else args.report.absolute().parent
    announce(lambda machine: gate_cost(parts, gate, machine), folder, args.anyway)
    plan = DriftPlan(
        Path(name).name, policy.name, policy.thresholds, args.judge, args.sensitivity, backend=args.backend
    )
    engines = None if args.backend is None else Engines(candidate, args.backend, scenes[0])
    with nullcontext() if engines is None else closing(engines):
        plan = dataclasses.replace(plan, engines=engines)
        report, images = compare(candidate, reference, cases, scenes[0], plan, stage_bars())
    _keep(args, report, images)
    return 0 if report.passed else 1


def _keep(args: argparse.Namespace, report: DriftReport, images: ShownImages) -> None:
    """Write the files and print the result; it is printed even if a file cannot be written."""
    from arcflow_export.drift.write_report import as_json, write_json, write_report

    files: dict[str, Callable[[], None]] = {}
    if args.report is not None:
        files[f"--report: {args.report}"] = lambda: write_report(args.report, report, images)
    if args.json not in (None, "-"):
        files[f"--json: {args.json}"] = lambda: write_json(Path(args.json), report)
    failed = []
    try:
        for name, write in files.items():
            try:
                write()
            except OSError as e:
                failed.append(f"{name} could not be written ({e.strerror or e})")
    finally:
        print(as_json(report) if args.json == "-" else f"{report.summary()}\n", end="")
    if failed:
        raise ExportError(f"{'; '.join(failed)}; only the printed result is left of the comparison")
