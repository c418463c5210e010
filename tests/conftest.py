"""Shared fixtures: bundles exported once per run from the golden checkpoints."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import pytest

from arcflow_export.export import export_bundle, plan_export
from arcflow_export.load import Student, load_student
from arcflow_export.options import Options
from arcflow_export.sources import Location
from arcflow_runtime import cli

GOLDEN = Path(__file__).parent / "golden"
SHAPES = Path(__file__).parent.parent / "models" / "shapes"
FAMILIES = ("flux-tiny", "qwen-tiny")


def golden_student(name: str, loras: list | None = None) -> Student:
    return load_student(Location(str(GOLDEN / name / "base")), Location(str(GOLDEN / name / "adapter")), loras or [])


def shapes_student() -> Student:
    return load_student(Location(str(SHAPES / "teacher")), Location(str(SHAPES / "adapter")), [])


#: Of the shapes model's bundle, as `make engine` exports it.
SHAPES_OPTIONS = {"max_px": 64, "max_sequence_length": 12}


def export(student: Student, out: Path, **options) -> Path:
    return export_bundle(plan_export(student, Options(**options)), out, "test")


@dataclass(frozen=True)
class CommandRun:
    """What `arcflow export` wrote and printed."""

    bundle: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def command_run(tmp_path_factory) -> CommandRun:
    """The golden FLUX student exported in bfloat16 by the command, once per run."""
    bundle = tmp_path_factory.mktemp("command") / "bundle"
    arguments = ["--base", GOLDEN / "flux-tiny" / "base", "--adapter", GOLDEN / "flux-tiny" / "adapter"]
    arguments += ["--out", bundle, "--dtype", "bfloat16", "--json"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["export", *map(str, arguments)])
    return CommandRun(bundle, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """A function (golden name or "shapes", **options) -> bundle, exported on first use and shared by all tests."""
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def get(name: str, **options) -> Path:
        key = (name, tuple(sorted(options.items())))
        if key not in made:
            student = shapes_student() if name == "shapes" else golden_student(name)
            made[key] = export(student, root / str(len(made)), **options)
        return made[key]

    return get
