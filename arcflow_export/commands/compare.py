"""Generate the same prompts from the same noise with several bundles, and compare time, memory and images.

A bundle may be given more than once, with different numbers of steps: teacher@50 teacher@8 student@2. The first one is
the reference for errors and speed-ups. Bundles run one after the other. --out gets a table (compare.md), compare.json,
a contact sheet with the time under each image, and a plot of quality against time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_runtime.backends import DEFAULT_BACKEND, choices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcflow_export.compare.generate import Generated
    from arcflow_export.compare.report import Row
    from arcflow_export.drift.cases import DriftCase

_JSON = "compare.json"
LIMIT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", nargs="+", metavar="BUNDLE[@STEPS]", help="bundle, and its number of steps")
    parser.add_argument(
        "--prompts", required=True, metavar="NAME|FILE", help="general, shapes, or a file with one prompt per line"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help="number of prompts; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt's noise; default: %(default)s")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: 1024 or the nearest allowed)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as for --height)")
    parser.add_argument("--guidance-scale", type=float, help="for FLUX bundles with guidance")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="for bundles that are guided by one")
    parser.add_argument("--true-cfg-scale", type=float, help="scale of that guidance (default: the bundle's)")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="judge of shapes, such as models/shapes/judge")
    parser.add_argument("--backend", choices=choices(), default=DEFAULT_BACKEND, help="engine (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    """Compare the bundles and write the report."""
    from arcflow_export.drift.cases import SHAPES, read_cases
    from arcflow_runtime.errors import RequestError

    _check_out(args.out)
    if args.judge is not None and args.prompts != SHAPES:
        raise RequestError(f"--judge needs --prompts {SHAPES}: it knows what attributes these captions name")
    cases = read_cases(args.prompts, args.limit, args.seed)
    from tqdm import tqdm

    from arcflow_export.compare.generate import Request, generate, parse_subjects
    from arcflow_export.compare.report import as_dict, compare, table

    subjects = parse_subjects(args.bundle)
    request = Request(
        args.height,
        args.width,
        args.guidance_scale,
        args.negative_prompt,
        args.true_cfg_scale,
        args.backend,
        args.threads,
    )
    with tqdm(total=len(set(subjects)) * len(cases), unit="image", disable=None) as bar:

        def progress(name: str) -> None:
            bar.set_description(name)
            bar.update()

        results = generate(subjects, cases, request, progress)
    for result in results:
        for warning in result.warnings:
            print(f"warning: {result.subject.name}: {warning}", file=sys.stderr)
    rows = compare(results, cases, args.judge)
    _write(args, rows, results, cases)
    print(json.dumps([as_dict(row) for row in rows], indent=2) if args.json else f"{table(rows)}\n\nwrote {args.out}")
    return 0


def _check_out(out: Path) -> None:
    from arcflow_export.errors import ExportError
    from arcflow_runtime.disk.outputs import check_writable

    if not out.absolute().parent.is_dir():
        raise ExportError(f"--out: {out.absolute().parent} is not a directory; create it first")
    if out.is_symlink() or (out.exists() and not (out / _JSON).is_file()):
        raise ExportError(f"--out: {out} exists and is not a comparison; it will not be overwritten, give another name")
    check_writable(out, "--out", ExportError)


def _write(
    args: argparse.Namespace, rows: Sequence[Row], results: Sequence[Generated], cases: Sequence[DriftCase]
) -> None:
    from importlib import metadata

    from arcflow_export.compare.figures import contact_sheet, quality_figure
    from arcflow_export.compare.report import as_dict, table
    from arcflow_runtime.disk.files import whole_directory

    height, width = results[0].images.shape[1:3]
    settings = {
        "prompts": args.prompts,
        "count": len(cases),
        "seed": args.seed,
        "height_px": height,
        "width_px": width,
        "backend": args.backend,
        "negative_prompt": args.negative_prompt,
        "true_cfg_scale": args.true_cfg_scale,
        "guidance_scale": args.guidance_scale,
        "arcflow": metadata.version("arcflow"),
    }
    data = {"settings": settings, "rows": [as_dict(row) for row in rows]}
    with whole_directory(args.out) as folder:
        (folder / _JSON).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        (folder / "compare.md").write_text(table(rows) + "\n", encoding="utf-8")
        contact_sheet(results, [case.prompt for case in cases]).save(folder / "contact_sheet.png")
        quality_figure(rows, folder / "compare.svg")
