"""A bundle appears whole or not at all, whatever stops the export."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from arcflow_export.errors import ExportError
from arcflow_export.export import staging
from arcflow_export.export.export import plan_export
from arcflow_export.export.staging import staged
from arcflow_export.export.write import write_weights
from arcflow_export.options import ExportOptions
from tests.conftest import GOLDEN, golden_student


def make(path, text="old"):
    path.mkdir()
    (path / "manifest.json").write_text(text)
    return path


def stage(out, overwrite, error):
    """Write half a bundle and fail."""
    with staged(out, overwrite, 0) as folder:
        (folder / "manifest.json").write_text("half")
        raise error


def fails(out, message, overwrite=False, needed=0):
    with pytest.raises(ExportError) as error, staged(out, overwrite, needed):
        pytest.fail("the block must not be entered")
    assert str(error.value) == message


def test_appears_when_done(tmp_path):
    out = tmp_path / "out"
    with staged(out, False, 0) as folder:
        (folder / "manifest.json").write_text("new")
        assert not out.exists()
        assert folder.parent == tmp_path  # the rename must not cross file systems
    assert (out / "manifest.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error):
        stage(tmp_path / "out", False, error)
    assert os.listdir(tmp_path) == []


def test_relative_and_trailing_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged(staging.Path("out/"), False, 0):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_missing_parent(tmp_path):
    fails(tmp_path / "no" / "out", f"--out: {tmp_path}/no is not a directory; create it first")


def test_existing(tmp_path):
    out = make(tmp_path / "out")
    fails(out, f"--out: {out} exists; give another name, or --overwrite to replace it when done")


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path, kind, overwrite):
    out = tmp_path / "out"
    {"file": out.touch, "directory": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[kind]()
    fails(out, f"--out: {out} exists and is not a bundle; it will not be overwritten, give another name", overwrite)
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_keeps_the_old_until_the_new_is_complete(tmp_path):
    out = make(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^stop$"):
        stage(out, True, ValueError("stop"))
    assert (out / "manifest.json").read_text() == "old"
    with staged(out, True, 0) as folder:
        (folder / "manifest.json").write_text("new")
        assert (out / "manifest.json").read_text() == "old"
    assert (out / "manifest.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_second_writer(tmp_path):
    out = tmp_path / "out"
    with staged(out, False, 0) as folder:
        fails(out, f"--out: another export is writing {out}; wait for it or give another name")
        assert folder.is_dir()
    with staged(tmp_path / "other", False, 0):
        pass
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_killed_between_the_two_renames(tmp_path):
    """The bundle that was to be replaced then has only its hidden name; the next run moves it back."""
    make(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    out = tmp_path / "out"
    fails(out, f"--out: {out} exists; give another name, or --overwrite to replace it when done")
    assert os.listdir(tmp_path) == ["out"]
    make(tmp_path / ".out.old", "older")  # killed after the renames: the old bundle is only left over
    with staged(out, True, 0) as folder:
        (folder / "manifest.json").write_text("new")
    assert (out / "manifest.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000_000))
    message = (
        f"--out: {tmp_path} has 1.5 GB free, the bundle needs 24.0 GB; "
        "free some space, or give a folder on a larger disk"
    )
    fails(tmp_path / "out", message, needed=24_000_000_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up(tmp_path, number):
    with pytest.raises(ExportError) as error:
        stage(tmp_path / "out", False, OSError(number, os.strerror(number)))
    assert str(error.value) == f"the disk of {tmp_path} is full; nothing was left behind"
    assert os.listdir(tmp_path) == []


def test_writing_weights_to_a_full_disk():
    """/dev/full fails every write as a full disk does; the reading thread must end too."""
    student = golden_student("flux-tiny")
    planned = next(p for p in plan_export(student, ExportOptions()).parts if p.part.name == "backbone")
    with pytest.raises(OSError, match="No space left on device"):
        write_weights(staging.Path("/dev/full"), planned.params, student.source("backbone"), lambda _: None)


@pytest.fixture
def running(request, tmp_path):
    """An export in its own process, which writes one file and then waits for the test to stop it."""
    golden = GOLDEN / "qwen-tiny"
    cache = getattr(request.config, "cache", None)
    command = [sys.executable, "-m", "tests.held_export", "export", "--base", golden / "base"]
    process = subprocess.Popen(
        [*command, "--adapter", golden / "adapter", "--out", tmp_path / "out"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRACES": str(cache.mkdir("traces") if cache else tmp_path.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT (`nohup make test &`), and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    if "written\n" not in process.stdout:  # reads until that line, or until the process ends
        pytest.fail(process.communicate()[1])
    assert os.listdir(tmp_path / ".out.partial")
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_sigkill(running, tmp_path):
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path)) == [".out.lock", ".out.partial"]
    with staged(tmp_path / "out", False, 0) as folder:
        assert os.listdir(folder) == []
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_ctrl_c(running, tmp_path):
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error.endswith("arcflow export: interrupted\n")
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_sigterm(running, tmp_path):
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 143
    assert os.listdir(tmp_path) == []
