"""Outputs are tried before any work is done, and a result is shown even where its files cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from arcflow_export.drift.write_report import check_report
from arcflow_export.errors import ExportError
from arcflow_export.export.staging import check_out
from arcflow_runtime import cli
from arcflow_runtime.disk.outputs import check_file, check_writable
from arcflow_runtime.errors import EngineError, RequestError
from tests.fake_bundle import make_bundle

NOWHERE = "/proc/x.png cannot be written (No such file or directory); give another place"


@pytest.fixture
def full(monkeypatch):
    """A disk that takes names but no bytes."""

    class Full:
        def __init__(self, handle, mode):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.handle)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdopen", Full)


def test_nothing_is_left_of_the_trial(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("new", "old", "a" * 230):
        check_writable(tmp_path / name, "--out")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("error", [RequestError, ExportError])
def test_places_that_cannot_be_written(error):
    with pytest.raises(error) as raised:
        check_writable(Path("/proc/x.png"), "--out", error)
    assert str(raised.value) == f"--out: {NOWHERE}"


def test_relative_names_are_tried_in_the_working_directory(monkeypatch):
    monkeypatch.chdir("/proc")
    with pytest.raises(RequestError) as raised:
        check_writable(Path("x.png"), "--out")
    assert str(raised.value) == f"--out: {NOWHERE.removeprefix('/proc/')}"


def test_full_disk(tmp_path, full):
    with pytest.raises(RequestError) as raised:
        check_writable(tmp_path / "x", "--json")
    assert str(raised.value) == (
        f"--json: {tmp_path / 'x'} cannot be written (No space left on device); give another place"
    )
    assert os.listdir(tmp_path) == []


def test_name_that_is_too_long(tmp_path):
    with pytest.raises(RequestError, match=r"cannot be written \(File name too long\); give another place$"):
        check_writable(tmp_path / ("a" * 250), "--out")


def test_file(tmp_path):
    (tmp_path / "file").touch()
    check_file(tmp_path / "file", "--json")
    for out, message in (
        (tmp_path, f"{tmp_path} is a directory; give a file's name"),
        (tmp_path / "no" / "x", f"{tmp_path / 'no'} is not a directory; create it first"),
        (tmp_path / "file" / "x", f"{tmp_path / 'file'} is not a directory; create it first"),
        (Path("/proc/x.png"), NOWHERE),
    ):
        with pytest.raises(EngineError) as raised:
            check_file(out, "--json", EngineError)
        assert str(raised.value) == f"--json: {message}"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "{bundle}", "x", "--out", "/proc/x.png"], "--out"),
        (["bench", "{bundle}", "--json", "/proc/x.png"], "--json"),
        (["profile", "{bundle}", "--trace", "/proc/x.png"], "--trace"),
        (["verify", "{bundle}", "--against", "{bundle}", "--report", "/proc/x.png"], "--report"),
        (["verify", "{bundle}", "--against", "{bundle}", "--json", "/proc/x.png"], "--json"),
        (["quantize", "{bundle}", "--scales", "none", "--out", "/proc/x.png"], "--out"),
        (["export", "--base", "none", "--adapter", "none", "--out", "/proc/x.png"], "--out"),
        (["calibrate", "--base", "none", "--adapter", "none", "--out", "/proc/x.png"], "--out"),
    ],
)
def test_commands_name_the_option_before_any_work(tmp_path, capsys, arguments, option):
    """The bundle's graphs are no graphs, and the sources do not exist: whatever is opened gives another error."""
    bundle = make_bundle(tmp_path / "bundle")
    assert cli.main([a.format(bundle=bundle) for a in arguments]) in (1, 2)
    assert capsys.readouterr().err == f"arcflow {arguments[0]}: error: {option}: {NOWHERE}\n"


def test_replacing_needs_the_folder_too(tmp_path, full):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").touch()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "drift.json").touch()
    for check, option, name in (
        (lambda out: check_out(out, True), "--out", "bundle"),
        (check_report, "--report", "report"),
    ):
        with pytest.raises(ExportError) as raised:
            check(tmp_path / name)
        assert str(raised.value) == (
            f"{option}: {tmp_path / name} cannot be written (No space left on device); give another place"
        )


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """A function (arguments) -> exit code of a comparison that passes, whose report cannot be written at its end."""
    report = SimpleNamespace(passed=True, summary=lambda: "the summary", as_json=lambda: {"passed": True})
    monkeypatch.setattr("arcflow_export.drift.compare.compare", lambda *_: (report, None))
    # The bundle's graphs are no graphs, so nothing in them can be counted.
    monkeypatch.setattr("arcflow_export.drift.cost.gate_work", lambda *_: ({}, None))
    monkeypatch.setattr("arcflow_export.commands.drift.announce", lambda *_: None)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("arcflow_export.drift.write_report.write_report", fail)
    monkeypatch.setattr("arcflow_export.drift.write_report.write_json", fail)
    bundle = make_bundle(tmp_path / "bundle")
    size = ["--height", "64", "--width", "64", "--limit", "1"]
    return lambda *more: cli.main(["verify", str(bundle), "--against", str(bundle), *size, *map(str, more)])


def test_summary_is_printed_although_the_report_cannot_be_written(compared, tmp_path, capsys):
    kept = "only the printed result is left of the comparison"
    assert compared() == 0
    assert capsys.readouterr().out == "the summary\n"
    assert compared("--report", tmp_path / "report", "--json", tmp_path / "drift.json") == 1
    out, err = capsys.readouterr()
    assert out == "the summary\n"
    assert err == (
        f"arcflow verify: error: --report: {tmp_path / 'report'} could not be written (No space left on device); "
        f"--json: {tmp_path / 'drift.json'} could not be written (No space left on device); {kept}\n"
    )
    assert compared("--report", tmp_path / "report", "--json") == 1
    out, err = capsys.readouterr()
    assert out == '{\n  "passed": true\n}\n'
    assert err.endswith(f"report could not be written (No space left on device); {kept}\n")
