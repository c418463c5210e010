"""What TensorRT-RTX compiled, kept on disk."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import threading

import pytest

from arcflow_runtime.gpu import runtime_cache
from arcflow_runtime.gpu.runtime_cache import RuntimeCacheFile

KEY = ("engine", "1.7.1", "13.0", "RTX")


def test_written_and_read_by_key(tmp_path):
    file = RuntimeCacheFile(KEY, tmp_path / "new" / "folder")
    assert file.read() is None
    file.write(b"kernels")
    assert RuntimeCacheFile(KEY, file.path.parent).read() == b"kernels"
    for i in range(len(KEY)):
        other = RuntimeCacheFile([*KEY[:i], "other", *KEY[i + 1 :]], file.path.parent)
        assert other.path != file.path
        assert other.read() is None
    assert sorted(p.suffix for p in file.path.parent.iterdir()) == [".cache", ".lock"]


def test_what_is_there_already_is_not_written_again(tmp_path):
    file = RuntimeCacheFile(KEY, tmp_path)
    file.write(b"kernels")
    file.path.unlink()
    file.write(b"kernels")
    assert not file.path.exists()
    file.write(b"more kernels")
    assert file.path.read_bytes() == b"more kernels"


def test_a_folder_that_cannot_be_written_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "arcflow"):
        RuntimeCacheFile(KEY, tmp_path / "file").write(b"kernels")
    assert [r.message for r in caplog.records] == [
        f"TensorRT-RTX's compiled kernels cannot be cached in {tmp_path / 'file'}: File exists"
    ]


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    file = RuntimeCacheFile(KEY, tmp_path)
    file.write(b"kernels")
    monkeypatch.setattr(runtime_cache, "MAX_BYTES", 3)
    assert file.read() is None


def test_a_writer_waits_for_the_lock(tmp_path):
    file = RuntimeCacheFile(KEY, tmp_path)
    with file.path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        thread = threading.Thread(target=file.write, args=(b"kernels",))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not file.path.exists()
        fcntl.flock(lock.fileno(), fcntl.LOCK_UN)
    thread.join(10)
    assert file.path.read_bytes() == b"kernels"


def _write(folder, content):
    for _ in range(20):
        RuntimeCacheFile(KEY, folder).write(content * 100_000)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_processes_leave_one_whole_file(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, c)) for c in (b"a", b"b", b"c")]
    for p in processes:
        p.start()
    while any(p.is_alive() for p in processes):
        found = RuntimeCacheFile(KEY, tmp_path).read()
        assert found is None or (len(found) == 100_000 and len(set(found)) == 1)
    assert all(p.exitcode == 0 for p in processes)
    assert not list(tmp_path.glob("*.partial"))
