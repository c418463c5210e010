"""What `arcflow compile` does again after it was stopped, killed or changed: every stage, at every point."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from arcflow_export.pipeline.identity import identify
from tests import compiling
from tests.compiling import STAGES, WHOLE, compile_, files, log, reached, records, said, start

place = compiling.place
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
#: Where there is most to lose, stopped in every way; and every other stage, killed in two ways.
ENDS = [("calibrate", "SIGINT")]
OTHER_ENDS = [("calibrate", how) for how in ("both", "SIGTERM")]
OTHER_ENDS += [(stage, how) for stage in STAGES for how in ("parent", "stage")]
ENDS += [slow(*end) for end in OTHER_ENDS]


def test_every_stage_runs_once(place, capsys):
    assert compile_() == 0
    assert log() == list(STAGES)
    assert files() == WHOLE
    assert {r["state"] for r in records()["outputs"].values()} == {"done"}
    capsys.readouterr()
    assert compile_() == 0
    assert log() == ["build"]  # it knows itself which engines are unchanged
    out = capsys.readouterr().out
    assert (
        "  export     done\n  calibrate  done\n  quantize   done\n  verify     done\n  build      checked again\n"
        in out
    )
    assert "\nquantize: done, out/some-fp8\n" in out


@pytest.mark.parametrize("point", ["before", "after"])
@pytest.mark.parametrize(("stage", "how"), ENDS)
def test_killed_in_a_stage_the_next_run_goes_on(place, stage, point, how):
    pause = Path(f"fake/{stage}.{point}")
    pause.touch()
    run = start(place)
    child = reached(point, stage)
    if how in ("SIGINT", "SIGTERM"):
        run.send_signal(getattr(signal, how))
    if how in ("parent", "both"):
        run.kill()
    if how in ("stage", "both"):
        os.kill(child, signal.SIGKILL)
    err = run.communicate(timeout=60)[1]
    code = {"SIGINT": 130, "SIGTERM": 143, "stage": 137}.get(how, -signal.SIGKILL)
    assert run.returncode == code
    if how in ("SIGINT", "SIGTERM"):
        assert "stopped; run the same command again to continue\n" in err
    if how == "stage":
        assert err == (
            f"arcflow compile: error: {stage} was killed, maybe because memory ran out; "
            "run the same command again; finished stages are kept\n"
        )
    before = STAGES[: STAGES.index(stage) + 1]
    assert log() == list(before)
    pause.unlink()
    assert compile_() == 0
    # After the rename its output is whole; `build` always runs.
    again = STAGES[STAGES.index(stage) + (point == "after") :]
    assert log() == list(again or ["build"])
    assert files() == WHOLE
    assert {r["state"] for r in records()["outputs"].values()} == {"done"}
    assert compile_() == 0
    assert log() == ["build"]


@pytest.mark.slow
@pytest.mark.parametrize("point", ["put", "replace"])
@pytest.mark.parametrize("stage", STAGES[:-1])
def test_killed_before_the_record_is_written(place, stage, point):
    run = start(place, FAKE_KILL=f"{point} {stage}")
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert log("finish") == list(STAGES[: STAGES.index(stage) + 1])
    assert compile_() == 0
    assert log() == list(STAGES[STAGES.index(stage) + 1 :])
    assert files() == WHOLE


def test_what_a_killed_stage_left_beside_its_output_is_removed(place):
    run = start(place, FAKE_KILL="put calibrate")
    run.communicate(timeout=60)
    for name in (".some-scales.json.lock", "some-scales.json.state.safetensors"):
        Path("out", name).touch()
    Path("out/.some-scales.json.old").mkdir()
    assert compile_() == 0
    assert files() == WHOLE
    assert not Path("out/.some-scales.json.old").exists()


@pytest.mark.slow
def test_a_killed_run_with_other_arguments_is_no_result_of_these(place):
    Path("fake/calibrate.after").touch()
    run = start(place, "--limit", "2")
    reached("after", "calibrate")
    run.kill()
    run.communicate(timeout=60)
    Path("fake/calibrate.after").unlink()
    log()
    assert compile_("--limit", "3") == 0
    assert log() == ["calibrate", "quantize", "verify", "build"]


def test_two_runs_at_once(place):
    Path("fake/export.before").touch()
    first = start(place)
    reached("before", "export")
    second = start(place)
    assert said(second) == "another run is compiling some in out; waiting for it to end\n"
    Path("fake/export.before").unlink()
    for run in (first, second):
        run.communicate(timeout=60)
        assert run.returncode == 0
    assert log() == [*STAGES, "build"]


@pytest.mark.slow
def test_the_lock_lasts_as_long_as_the_last_stage(place):
    """A stage in a library's code may need minutes to end."""
    for name in ("export.before", "export.deaf"):
        Path("fake", name).touch()
    first = start(place)
    reached("before", "export")
    first.kill()
    first.wait(60)
    second = start(place)
    assert said(second) == "another run is compiling some in out; waiting for it to end\n"
    assert log() == ["export"]
    Path("fake/export.before").unlink()
    second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert second.returncode == 0
    assert log() == ["calibrate", "quantize", "verify", "build"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["--limit", "3"], ["calibrate", "quantize", "verify", "build"]),
        slow(["--size", "64x96"], ["calibrate", "quantize", "verify", "build"]),
        slow(["--policy", "shapes"], ["quantize", "verify", "build"]),
        slow(["--no-gate"], ["build"]),
        slow(["--target", "sm120"], ["build"]),
        slow(["--backend", "onnxruntime"], ["export", "quantize", "verify"]),  # FP8 is made from float32 for it
    ],
)
def test_other_arguments(place, change, again):
    assert compile_() == 0
    log()
    assert compile_(*change) == 0
    assert log() == again


@pytest.mark.slow
def test_other_sources(place):
    assert compile_() == 0
    log()
    Path("base/weights").write_text("BASE")
    assert compile_() == 0
    assert log() == list(STAGES)
    Path("prompts.txt").write_text("other\n")
    assert compile_() == 0
    assert log() == list(STAGES[1:])
    # Written again with the same contents: what is made of it is the same, and so are the stages after that.
    os.utime("base/weights", (1, 1))
    assert compile_() == 0
    assert log() == ["export", "calibrate", "build"]


@pytest.mark.parametrize(
    ("name", "again"),
    [
        slow("some-bf16", ["export", "build"]),
        slow("some-scales.json", ["calibrate", "build"]),
        ("some-fp8", ["quantize", "build"]),
        slow("some-drift", ["verify", "build"]),
    ],
)
@pytest.mark.parametrize("how", ["edited", slow("removed")])
def test_a_changed_output_is_made_again(place, name, again, how):
    assert compile_() == 0
    log()
    path = next(p for p in (Path("out", name, f) for f in ("weights", "drift.json", "")) if p.is_file())
    path.write_text(path.read_text() + " ") if how == "edited" else path.unlink()
    assert compile_() == 0
    assert log() == again
    assert files() == WHOLE


def test_an_edited_record(place, capsys):
    assert compile_() == 0
    log()
    path, data = Path("out/.some.stages.json"), records()
    data["outputs"]["some-fp8"]["key"] = "0"
    path.write_text(json.dumps(data))
    assert compile_() == 0
    assert log() == ["quantize", "build"]
    data["outputs"]["some-fp8"]["more"] = 1
    capsys.readouterr()
    for text, message in (
        (
            json.dumps(data),
            ": outputs.some-fp8: unknown keys ['more']; known are ['before', 'key', 'output', 'peak_bytes', 'seconds', "
            "'stage', 'state']",
        ),
        (json.dumps(data | {"version": 2}), ": version must be 1, got 2"),
        (json.dumps({"format": "other"}), ": 'format' must be 'arcflow-stages'"),
        ("{", " is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ):
        path.write_text(text)
        assert compile_() == 1
        expected = f"arcflow compile: error: out/.some.stages.json{message}; remove it to start again\n"
        assert capsys.readouterr().err == expected
    assert log() == []


def test_a_stage_that_fails(place, capsys):
    Path("fake/quantize.code").write_text("2")
    assert compile_() == 2
    assert capsys.readouterr().err == (
        "arcflow compile: error: quantize failed; fix its error and run the same command again; "
        "finished stages are kept\n"
    )
    assert log() == ["export", "calibrate", "quantize"]
    Path("fake/quantize.code").unlink()
    assert compile_() == 0
    assert log() == ["quantize", "verify", "build"]


@pytest.mark.slow
def test_a_failed_gate_runs_again(place, capsys):
    Path("fake/verify.code").write_text("1")
    for again in (list(STAGES[:-1]), ["verify"]):
        assert compile_() == 1
        assert log() == again
    err = capsys.readouterr().err
    assert err.startswith(
        "arcflow compile: error: the drift gate failed, see its tables; leave layers out with --policy FILE, "
        "or skip it with --no-gate\n"
    )
    # Killed after it had written its report, it failed all the same.
    shutil.rmtree("out/some-drift")
    Path("fake/verify.after").touch()
    run = start(place)
    reached("after", "verify")
    run.kill()
    run.communicate(timeout=60)
    for name in ("verify.after", "verify.code"):
        Path("fake", name).unlink()
    log()
    assert compile_() == 0
    assert log() == ["verify", "build"]


def test_a_lora_is_identified_with_the_config_beside_it(tmp_path):
    """The adapter_config.json beside a LoRA can change its scale."""
    lora, config = tmp_path / "ink.safetensors", tmp_path / "adapter_config.json"
    lora.write_bytes(b"factors")
    alone = identify(lora)
    config.write_text('{"lora_alpha": 4}')
    first = identify(lora)
    config.write_text('{"lora_alpha": 8}')
    assert len({alone, first, identify(lora)}) == 3
    config.unlink()
    assert identify(lora) == alone
