"""`arcflow profile` with ONNX Runtime's own profiling."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from arcflow_runtime import cli
from arcflow_runtime.commands.profile import summarise, trace_events
from arcflow_runtime.engines.base import LayerTime
from tests.conftest import SHAPES_OPTIONS

SIZE = ["--height", "32", "--width", "32", "--threads", "1"]


def test_table_and_trace(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    trace = tmp_path / "trace.json"
    assert (
        cli.main(["profile", str(bundles("shapes", **SHAPES_OPTIONS)), *SIZE, "--top", "3", "--trace", str(trace)]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["part", "layer", "operator", "runs", "ms", "%"]
    assert lines[4].strip().startswith("and ")
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(rows.values()) == {"text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder"}
    layers = [e for e in events if e["ph"] == "X"]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in layers)
    assert "MatMul" in {e["cat"] for e in layers}
    # of the second picture only, and in the order of the stages: texts, conditioner, two steps, decoder
    start = {part: min(e["ts"] for e in layers if rows[e["tid"]] == part) for part in rows.values()}
    assert start["text_encoder"] < start["conditioner"] < start["backbone"] < start["vae_decoder"]
    assert not list((tmp_path / "scratch").iterdir()), "the profiles were not removed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch", "trace.json"]


def test_every_step_is_counted(bundles, capsys):
    assert cli.main(["profile", str(bundles("shapes", **SHAPES_OPTIONS)), *SIZE, "--steps", "3", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    runs = {row["part"]: row["runs"] for row in rows}
    assert runs == {"text_encoder": 1, "text_encoder_2": 1, "conditioner": 1, "backbone": 3, "vae_decoder": 1}
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)


def test_bad_usage(bundles, capsys):
    root = str(bundles("shapes", **SHAPES_OPTIONS))
    assert cli.main(["profile", root, "--top", "0"]) == 2
    assert cli.main(["profile", root, "--trace", "no/t.json"]) == 2
    assert cli.main(["profile", root, "--backend", "onnxruntime-cuda"]) == 1
    assert capsys.readouterr().err == (
        "arcflow profile: error: --top must be at least 1, got 0\n"
        "arcflow profile: error: --trace must be in a directory that exists, got 'no/t.json'\n"
        "arcflow profile: error: onnxruntime-cuda cannot time layers; use another --backend\n"
    )


@pytest.fixture
def layers():
    return {
        "backbone": [LayerTime("a", "MatMul", 1000.0, 10.0), LayerTime("b", "Add", 1010.0, 5.0)] * 2,
        "vae_decoder": [LayerTime("a", "", 2000.0, 100.0)],
    }


def test_summary(layers):
    assert summarise(layers) == [
        {"part": "vae_decoder", "layer": "a", "operator": "", "runs": 1, "ms": 0.1},
        {"part": "backbone", "layer": "a", "operator": "MatMul", "runs": 2, "ms": 0.02},
        {"part": "backbone", "layer": "b", "operator": "Add", "runs": 2, "ms": 0.01},
    ]


def test_events(layers):
    events = trace_events(layers)
    assert events[0] == {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "backbone"}}
    assert events[2] == {"name": "b", "cat": "Add", "ph": "X", "pid": 0, "tid": 0, "ts": 10.0, "dur": 5.0}
    assert events[-1]["cat"] == "vae_decoder"
    assert trace_events({}) == []


def test_a_trace_needs_no_folder_in_its_name(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(["profile", str(Path(bundles("shapes", **SHAPES_OPTIONS)).resolve()), *SIZE, "--trace", "t.json"]) == 0
    )
    assert (tmp_path / "t.json").is_file()
    capsys.readouterr()


def test_openvino(bundles, capsys):
    """The same counts as with ONNX Runtime, and each layer with the dtype that it is computed in."""
    pytest.importorskip("openvino")
    size = ["--height", "32", "--width", "32", "--steps", "3", "--backend", "openvino"]
    assert cli.main(["profile", str(bundles("shapes", **SHAPES_OPTIONS)), *size, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    runs = {(row["part"], row["runs"]) for row in rows if row["operator"] == "FullyConnected f32"}
    assert {("text_encoder", 1), ("backbone", 3)} <= runs
