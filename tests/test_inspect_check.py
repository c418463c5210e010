"""`arcflow inspect` hashes small files, and with --check every one: each is tried with a byte flipped."""

from __future__ import annotations

import pytest

from arcflow_runtime import cli
from arcflow_runtime.disk import bundle as bundle_module
from tests.fake_bundle import make_bundle


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["backbone.safetensors", "vae_decoder.safetensors"])
def test_a_damaged_large_file_is_found_by_check_alone(tmp_path, monkeypatch, capsys, name):
    root = make_bundle(tmp_path / "bundle")
    path = root / name
    # Not so small any more: the files of this bundle have a few bytes.
    monkeypatch.setattr(bundle_module, "FAST_HASH_BYTES", path.stat().st_size - 1)
    assert cli.main(["inspect", str(root), "--check"]) == 0
    assert capsys.readouterr().out.endswith("every file matches its SHA-256\n")
    flip(path)
    assert cli.main(["inspect", str(root)]) == 0
    assert capsys.readouterr().out.endswith("small files match their SHA-256\n")
    assert cli.main(["inspect", str(root), "--check"]) == 1
    assert f"{name} does not match its SHA-256" in capsys.readouterr().err


def test_a_damaged_small_file_is_found_without_check(tmp_path, capsys):
    root = make_bundle(tmp_path / "bundle")
    flip(root / "backbone.onnx")
    assert cli.main(["inspect", str(root)]) == 1
    assert "backbone.onnx does not match its SHA-256" in capsys.readouterr().err
