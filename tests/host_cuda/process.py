"""Run a file of cases in a process that has the driver: a path and pytest's arguments -> what each case said."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent.parent
#: The name of a test function -> its cases, each as (name, message, skipped). The message is empty if the case passed.
Report = dict[str, list[tuple[str, str, bool]]]


def functions(path):
    """The test functions of a file of cases, as pytest parameters; those marked slow keep the mark."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            slow = any(ast.unparse(d) == "pytest.mark.slow" for d in node.decorator_list)
            yield pytest.param(node.name, "slow" if slow else "not slow", marks=[pytest.mark.slow] * slow, id=node.name)


def cases_in(paths):
    """Like `functions`, for several files; each parameter set begins with the file's name."""
    return [
        pytest.param(path.stem, *case.values, marks=case.marks, id=f"{path.stem}-{case.id}")
        for path in sorted(paths)
        for case in functions(path)
    ]


def case_runner(once, environment: Mapping[str, str], timeout_s: float) -> Callable[..., Report]:
    """A function (path, *pytest's arguments, **variables) that runs a file of cases once, and returns its report.

    Args:
        once: the fixture.
        environment: of the process.
        timeout_s: ends a process that hangs.
    """

    def run(path: Path, *arguments: str, **variables: str) -> Report:
        def make(folder: Path) -> None:
            # `-c`: without this project's options for pytest.
            options = ["-c", os.devnull, "--rootdir", ROOT, "--confcutdir", path.parent, "-p", "no:cacheprovider"]
            command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *options]
            command += [f"--junit-xml={folder / 'report.xml'}", *arguments, path]
            with (folder / "output").open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [str(c) for c in command],
                    cwd=ROOT,
                    env={**environment, **variables},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                )

        folder = once(f"cases on the driver: {path.stem} {arguments} {variables}", make)
        if not (folder / "report.xml").is_file():
            end = (folder / "output").read_text(errors="replace")[-8000:]
            pytest.fail(f"the process crashed or hung:\n{end}", pytrace=False)
        return read_report(folder / "report.xml")

    return run


def read_report(path: Path) -> Report:
    """Read what pytest wrote."""
    found: Report = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "")
        wrong = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = "\n".join(f"{c.get('message', '')}\n{c.text or ''}" for c in wrong)
        skipped = bool(wrong) and all(c.tag == "skipped" for c in wrong)
        found.setdefault(name.split("[")[0], []).append((name, message, skipped))
    return found


def judge(cases: list[tuple[str, str, bool]]) -> None:
    """Fail if any case of a test function failed; skip if all of them were skipped."""
    failed = [f"{name}: {message}" for name, message, skipped in cases if message and not skipped]
    if failed:
        pytest.fail("\n\n".join(failed), pytrace=False)
    if all(skipped for _, _, skipped in cases):
        pytest.skip(cases[0][1].strip())
