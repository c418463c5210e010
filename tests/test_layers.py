"""The contracts of `make lint` fail on an import that goes up, sideways or round in a circle, and name it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed")
ROOT = Path(__file__).parent.parent
PACKAGES = (
    "arcflow_export",
    "runtime/arcflow_runtime",
    "calibration/arcflow_calibration",
    "distillation/arcflow_distill",
    "serving/arcflow_serve",
)
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
#: A module, an import that it must not have, and the contract that forbids it.
PLANTED = {
    "up to another package": (
        "arcflow_runtime.disk.manifest",
        "import arcflow_export.errors",
        "Packages: the runtime at the bottom, calibration and distillation side by side",
    ),
    "sideways": (
        "arcflow_calibration.options",
        "import arcflow_distill.errors",
        "Packages: the runtime at the bottom, calibration and distillation side by side",
    ),
    "up in the runtime, for types only": (
        "arcflow_runtime.maths.rotary",
        FOR_TYPES + "import arcflow_runtime.generate.pipeline",
        "The runtime's rooms",
    ),
    "up in the exporter, in a function": (
        "arcflow_export.formats.prompts",
        "def late():\n    import arcflow_export.verify.verify",
        "The exporter's rooms",
    ),
    "up in distillation": (
        "arcflow_distill.train.config",
        "import arcflow_distill.shapes.loop",
        "Distillation's rooms",
    ),
    "up in the service": (
        "arcflow_serve.waiting",
        "import arcflow_serve.lanes",
        "The service's rooms",
    ),
    "a circle in a room": (
        "arcflow_runtime.maths.dtypes",
        "import arcflow_runtime.maths.schedule",
        "No circle of modules or packages, imports for types included",
    ),
    "torch in the runtime": (
        "arcflow_runtime.generate.sheet",
        "import torch",
        "The runtime and the service never import torch",
    ),
}


def lint_imports(folder: Path, paths: list[Path]) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", ROOT / "pyproject.toml"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """A function (module) -> its file in a copy of the packages, and one to lint that copy."""
    roots = [tmp_path / Path(p).parent for p in PACKAGES]
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))

    def find(module: str) -> Path:
        return next(p for r in roots if (p := r / (module.replace(".", "/") + ".py")).exists())

    return find, lambda: lint_imports(tmp_path, roots)


def test_the_packages_as_they_are_keep_every_contract(copy):
    _, lint = copy
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr
    contracts = {contract for *_, contract in PLANTED.values()}
    assert {line.removesuffix(" KEPT") for line in done.stdout.splitlines() if line.endswith(" KEPT")} == contracts


@pytest.mark.parametrize(("module", "line", "contract"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_breaks_its_contract(copy, module, line, contract):
    find, lint = copy
    path = find(module)
    path.write_text(path.read_text() + f"\n{line}\n")
    done = lint()
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
    # Of a circle, the modules are named within their package, and the import to remove may be the other one.
    names = [name.split(".")[-1] for name in (module, line.split()[-1])]
    found = done.stdout.partition("Broken contracts")[2].splitlines()
    assert any(all(re.search(rf"\b{name}\b", x) for name in names) for x in found), done.stdout
