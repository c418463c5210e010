"""Locks between processes, and files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading

import numpy as np
import pytest
from fake_bundle import make_bundle
from safetensors.numpy import save_file

from arcflow_calibration.state import held
from arcflow_distill.errors import DistillError
from arcflow_distill.train.folders import training_folder
from arcflow_export.errors import CalibrationError, ExportError
from arcflow_export.export.staging import staged
from arcflow_runtime.disk import files
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import locked, locked_folder, whole_directory, whole_file
from arcflow_runtime.engines.store import locked_store
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.runtime_cache import RuntimeCacheFile

NO_LOCKS = "cannot be locked (Function not implemented): its file system has no locks; use a folder on another"


def test_a_lock_excludes_and_is_removed(tmp_path):
    lock = tmp_path / "lock"
    with locked(lock, EngineError, "busy"):
        with pytest.raises(EngineError, match=r"^busy$"), locked(lock, EngineError, "busy"):
            pytest.fail("the lock was given twice")
        assert lock.exists()
    assert not lock.exists()
    with locked(lock, EngineError, "busy", remove=False):
        pass
    assert lock.exists()


def test_a_lock_on_a_file_that_was_removed_is_taken_again(tmp_path, monkeypatch):
    """The one that held it removes its file between another's open and its lock."""
    lock, flock, handles = tmp_path / "lock", fcntl.flock, []

    def removed_once(handle, operation):
        handles.append(handle)
        if len(handles) == 1:
            lock.unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with locked(lock, EngineError, "busy"):
        assert len(handles) == 2
        with pytest.raises(EngineError, match=r"^busy$"), locked(lock, EngineError, "busy"):
            pytest.fail("the lock was given twice")


def test_waiting_for_a_lock(tmp_path):
    lock, order = tmp_path / "lock", []

    def wait():
        with locked(lock, EngineError, wait=True):
            order.append("waiter")

    with locked(lock, EngineError):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "waiter"]


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    folder = tmp_path / "engines"
    with locked_folder(folder, "busy", "engines"), pytest.raises(EngineError, match=r"^busy$"):
        _enter(locked_folder(folder, "busy", "engines"))
    assert not folder.exists()
    with locked_folder(folder, "busy", "engines"):
        (folder / "kept").touch()
    assert os.listdir(folder) == ["kept"]
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(EngineError, match=r"link cannot be written: it is a link; engines are kept beside their bun"):
        _enter(locked_folder(tmp_path / "link", "busy", "engines"))


def _tokenizers(bundle):
    pytest.importorskip("openvino_tokenizers")
    from arcflow_runtime.build.tokenizers.build import build_tokenizers

    build_tokenizers(bundle)


def _enter(manager):
    with manager:
        pytest.fail("the block was entered without a lock")


#: What each place that locks raises, and before which text.
PLACES = {
    "export": (lambda t, b: _enter(staged(t / "out", False, 0)), ExportError, "--out: {t} "),
    "engines": (lambda t, b: _enter(locked_store(b)), EngineError, "{b}/engines "),
    "tokenizers": (lambda t, b: _tokenizers(b), EngineError, "{b}/openvino "),
    "calibration": (lambda t, b: _enter(held(t / "scales.json")), CalibrationError, "--out: {t} "),
    "training": (lambda t, b: _enter(training_folder(t / "run", False, False, False)), DistillError, "--out: {t}/run "),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, place, number):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    monkeypatch.setattr(fcntl, "flock", flock)
    call, kind, start = PLACES[place]
    with pytest.raises(kind) as error:
        call(tmp_path, bundle)
    expected = start.format(t=tmp_path, b=bundle.root) + NO_LOCKS
    assert str(error.value) == expected.replace("Function not implemented", os.strerror(number))
    assert list(tmp_path.rglob("*lock")) == []


@pytest.mark.parametrize("place", PLACES)
def test_another_writer_is_named(tmp_path, monkeypatch, place):
    def flock(handle, operation):
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    monkeypatch.setattr(fcntl, "flock", flock)
    call, kind, _ = PLACES[place]
    with pytest.raises(kind, match=r"^(--out: )?another (export|build|run) is (writing|using) .*; wait for it"):
        call(tmp_path, bundle)


def test_a_cache_without_locks_is_not_kept(tmp_path, monkeypatch, caplog):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    file = RuntimeCacheFile(["key"], tmp_path)
    file.write(b"compiled")
    assert f"TensorRT-RTX's compiled kernels cannot be cached in {tmp_path}: {tmp_path} {NO_LOCKS}" in caplog.text
    assert file.read() is None


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_both(folder):
    """safetensors writes files that only their owner can read."""
    save_file({"x": np.zeros(1, np.float32)}, folder / "weights.safetensors")
    (folder / "config.json").write_text("{}")


def test_modes_follow_the_umask(tmp_path, umask):
    out = tmp_path / "out"
    with whole_directory(out) as folder:
        write_both(folder)
        (folder / "inner").mkdir()
        write_both(folder / "inner")
    with staged(tmp_path / "bundle", False, 0) as folder:
        write_both(folder)
    with whole_file(tmp_path / "state.safetensors") as partial:
        save_file({"x": np.zeros(1, np.float32)}, partial)
    found = {p.relative_to(tmp_path): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert found == dict.fromkeys(found, 0o666 & ~umask)
    assert len(found) == 7


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_full_disks():
    assert [files.is_full(OSError(n, "")) for n in (errno.ENOSPC, errno.EDQUOT, errno.EIO)] == [True, True, False]
