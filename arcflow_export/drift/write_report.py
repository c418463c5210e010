"""Write the drift gate's report to a directory, atomically: tables, JSON, a plot and a contact sheet."""

from __future__ import annotations

import json
from pathlib import Path

from arcflow_export.drift.compare import ShownImages
from arcflow_export.drift.report import DriftReport
from arcflow_export.errors import ExportError
from arcflow_runtime.disk.files import whole_directory, whole_file
from arcflow_runtime.disk.outputs import check_writable

_JSON = "drift.json"


def check_report(out: Path) -> None:
    """Check that a report can be written to `out`; called before any long work.

    Raises:
        ExportError: `out` exists and is not a report, or its parent does not exist or is not writable.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise ExportError(f"--report: {out.parent} is not a directory; create it first")
    if out.is_symlink() or (out.exists() and not (out / _JSON).is_file()):
        raise ExportError(
            f"--report: {out} exists and is not a drift report; it will not be overwritten, give another name"
        )
    check_writable(out, "--report", ExportError)


def write_report(out: Path, report: DriftReport, images: ShownImages) -> None:
    """Write `report.md`, `drift.json`, `contact_sheet.png` and, where layers are quantised, `drift.svg`."""
    from arcflow_export.drift.figures import contact_sheet, drift_figure

    with whole_directory(out) as folder:
        write_json(folder / _JSON, report)
        figure = ""
        if report.layers:
            drift_figure(report.layers, report.thresholds, folder / "drift.svg")
            figure = "\n![Error of every quantised layer at each step.](drift.svg)\n"
        contact_sheet(images.prompts, images.reference, images.candidate).save(folder / "contact_sheet.png")
        sheet = "\n![Reference, candidate and their amplified difference.](contact_sheet.png)\n"
        (folder / "report.md").write_text(report.text() + figure + sheet, encoding="utf-8")


def write_json(path: Path, report: DriftReport) -> None:
    """Write the report's JSON as one file."""
    with whole_file(path) as partial:
        partial.write_text(as_json(report), encoding="utf-8")


def as_json(report: DriftReport) -> str:
    """The report as JSON text."""
    return json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n"
