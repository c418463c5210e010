"""The benchmark of convergence: equal settings for both kinds, and the iterations that a kind needs for an error."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def convergence(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("convergence")
    for name in ("convergence", "machine"):
        sys.modules.pop(name, None)


def test_the_kinds_differ_in_their_modes_alone(convergence):
    arcs, linear = (convergence.settings(1, modes, 400, 8).model_dump() for modes in convergence.KINDS.values())
    assert {name for name in arcs if arcs[name] != linear[name]} == {"modes"}
    assert (arcs["modes"], linear["modes"], arcs["iterations"], arcs["decay_iterations"]) == (16, 1, 400, 100)


def test_iterations_until_an_error(convergence):
    assert convergence.points(64) == [0, 8, 11, 16, 23, 32, 45, 64]
    # The error falls to a tenth every 10 iterations.
    row = {"iterations": [0, 10, 20], "latent_error": [1.0, 0.1, 0.01]}
    assert convergence.reached(row, 10**-1.5) == pytest.approx(15)
    assert convergence.reached(row, 0.01) == 20
    assert convergence.reached(row, 0.001) is None
    slow = {"iterations": [0, 40, 80], "latent_error": [1.0, 0.1, 0.02]}
    euler, both = convergence.summary({"arcs-0": row, "linear-0": slow}, {"4": 0.1})
    assert (euler["error"], euler["arcs"], euler["linear"]) == (0.1, 10, 40)
    assert euler["ratio"] == 4
    assert (both["error"], both["linear"]) == (0.02, 80), "the worse of the two best errors"
    assert both["ratio"] == pytest.approx(80 / both["arcs"])
    never = convergence.summary({"arcs-0": row, "linear-0": slow}, {"4": 0.015})[0]
    assert (never["linear"], never["ratio"], convergence.shown(never["linear"])) == (None, None, "not reached")


@pytest.mark.slow
def test_a_run_continues_from_its_results(convergence, tmp_path, monkeypatch):
    file, plot = tmp_path / "results.json", tmp_path / "plot.svg"
    arguments = ["--iterations", "2", "--batch", "2", "--seeds", "1", "--count", "4", "--json", str(file)]
    assert convergence.main(arguments) == 0
    first = json.loads(file.read_text())
    assert first["students"]["arcs-0"]["iterations"] == [0, 2]
    monkeypatch.setattr(convergence, "train", None)
    assert convergence.main([*arguments, "--plot", str(plot)]) == 0
    assert json.loads(file.read_text())["students"] == first["students"]
    assert plot.read_text().startswith("<?xml")
    with pytest.raises(SystemExit, match="has results of other settings; give another file or remove it"):
        convergence.main([*arguments, "--batch", "3"])
