"""`arcflow compile`: the stages' commands, the plan and the tables, student files, and mistakes in all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcflow_export.pipeline import process
from arcflow_export.pipeline.students import load_student_file
from arcflow_runtime import Bundle, cli
from tests import compiling
from tests.compiling import HERE, STAGES, STUDENT, compile_, log
from tests.conftest import SHAPES

place = compiling.place


@pytest.mark.slow
def test_scales_of_ones_own(place):
    Path("own.json").write_text("own")
    assert compile_("--scales", "own.json") == 0
    assert log() == ["export", "quantize", "verify", "build"]
    assert Path("own.json").read_text() == "own"
    # Those that are made here are made again where the options change.
    assert compile_("--scales", "made.json") == 0
    assert log() == ["calibrate", "quantize", "verify", "build"]
    assert compile_("--scales", "made.json") == 0
    assert log() == ["build"]
    assert compile_("--scales", "made.json", "--limit", "2") == 0
    assert log() == ["calibrate", "quantize", "verify", "build"]


def commands(capsys):
    """The arguments of each stage that ran."""
    lines = [line.split(": arcflow ") for line in capsys.readouterr().out.splitlines() if ": arcflow " in line]
    return {name: command.split() for name, command in lines}


def test_stages_use_the_files_of_the_download(place, capsys):
    Path("student.toml").write_text(
        'name = "some"\nbase = "owner/base"\nadapter = "owner/arc"\nadapter_subfolder = "two"'
    )
    Path("fake/commit").write_text("c0ffee")
    assert compile_() == 0
    assert log() == ["download", *STAGES]
    ran = commands(capsys)
    download = "download --base owner/base --adapter owner/arc --adapter-subfolder two --json"
    assert " ".join(ran["download"]) == download
    pinned = "--base owner/base --base-revision c0ffee --adapter owner/arc --adapter-subfolder two"
    pinned += " --adapter-revision c0ffee --offline"
    for name in ("export", "calibrate"):
        assert " ".join(ran[name][1:]).startswith(pinned)
    # Nothing is asked of the hub where nothing is to be read.
    Path("fake/commit").write_text("decade")
    assert compile_() == 0
    assert log() == ["build"]
    capsys.readouterr()
    assert compile_("--limit", "2", "--offline") == 0
    assert log() == ["download", "calibrate", "quantize", "verify", "build"]
    assert commands(capsys)["download"][1:5] == ["--base", "owner/base", "--base-revision", "c0ffee"]


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (("--precision", "fp8", "--backend", "onnxruntime"), "float32"),
        (("--precision", "fp8", "--backend", "tensorrt-rtx"), "bfloat16"),
        (("--precision", "nvfp4", "--backend", "tensorrt-rtx"), "bfloat16"),
        (("--precision", "fp32", "--backend", "onnxruntime"), "float32"),
        (("--precision", "fp32", "--backend", "tensorrt-rtx"), "float32 --opset 20"),
        (("--precision", "fp16", "--backend", "onnxruntime"), "float16"),
        (("--backend", "onnxruntime"), "bfloat16"),
    ],
)
def test_what_is_exported(place, capsys, arguments, dtype):
    target = ["--target", "sm120"] if "tensorrt-rtx" in arguments else []
    assert cli.main(["compile", "student.toml", *arguments, *target]) == 0
    assert f" --dtype {dtype} --out " in " ".join(commands(capsys)["export"])


def test_the_plan_and_what_it_took(place, capsys):
    figures = [
        {"stage": "export", "seconds": 130.0, "memory_bytes": 2 << 30, "disk_bytes": 24 * 10**9, "note": "a note"},
        {"stage": "calibrate", "seconds": 9000.0, "memory_bytes": 3 << 29, "disk_bytes": 10**6, "note": ""},
        {"stage": "quantize", "seconds": 40.0, "memory_bytes": None, "disk_bytes": None, "note": ""},
    ]
    Path("fake/plan.json").write_text(json.dumps({"stages": figures, "machine": {"cores": 2}}))
    assert compile_("--dry-run") == 0
    assert capsys.readouterr().out == (
        "  stage      state   time    memory      disk\n"
        "  export     to do  2 min  2.00 GiB  24.00 GB\n"
        "  calibrate  to do  2.5 h  1.50 GiB   1.00 MB\n"
        "  quantize   to do   40 s\n"
        "  verify     to do\n"
        "  build      to do\n"
        "  all               2.5 h\n"
        "export: a note\n\n"
    )
    assert not Path("out").exists()
    assert compile_() == 1
    assert capsys.readouterr().err == "arcflow compile: error: a note (--anyway starts it nevertheless)\n"
    assert log() == []
    assert compile_("--json", "--anyway") == 0
    result = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in result.items() if k != "stages"} == {
        "student": "some",
        "bundle": "out/some-fp8",
        "backend": "tensorrt-rtx",
        "machine": {"cores": 2},
        "exit_code": 0,
    }
    first = result["stages"][0]
    assert [s["stage"] for s in result["stages"]] == list(STAGES)
    assert {s["state"] for s in result["stages"]} == {"ran"}
    assert (first["planned_seconds"], first["planned_memory_bytes"], first["note"]) == (130.0, 2 << 30, "a note")
    assert first["output"] == "out/some-bf16"
    assert first["bytes"] == sum(p.stat().st_size for p in Path("out/some-bf16").iterdir())
    assert first["peak_bytes"] > 1 << 20  # a Python that imports nothing takes several MiB
    assert first["seconds"] > 0


def test_without_figures(place, capsys):
    assert compile_("--dry-run") == 0
    assert capsys.readouterr().out.startswith(
        "`arcflow plan` gave no figures of time, memory and disk\n"
        "  stage      state  time  memory  disk\n"
        "  export     to do\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 1", "missing keys ['base']"),
        ('name = "a"\nbass = "b"', "unknown key 'bass'; did you mean 'base'?; the keys are name, base, adapter, "),
        (
            'name = "a/b"\nbase = "b"\nadapter = "c"',
            "name must be letters, digits, '.', '_' and '-', as files are named ",
        ),
        ('name = "a"\nbase = "b"\nadapter = "c"\nprecision = "fp4"', "precision must be one of ['fp32', 'bf16', "),
        (
            'name = "a"\nbase = "b"\nadapter = "c"\n[arguments]\nexprot = ""',
            "arguments: unknown key 'exprot'; did you mean 'export'?; the keys are export, calibrate, verify",
        ),
        (
            'name = "a"\nbase = "b"\nadapter = "c"\n[arguments]\nexport = "\'"',
            "arguments: export: No closing quotation in",
        ),
        (
            'name = "a"\nbase = "b"\nadapter = "c"\nloras = ["x:much"]',
            "loras must be PATH or PATH:SCALE with a number for SCALE, got 'x:much'",
        ),
        (
            'name = "a"\nbase = "b"\nadapter_subfolder = "c"',
            "adapter_subfolder and adapter_revision need adapter; give it, or leave them out",
        ),
        ("name", "not valid TOML (Expected '=' after a key in a key/value pair (at end of document))"),
    ],
)
def test_wrong_student_files(place, capsys, text, message):
    Path("student.toml").write_text(text)
    assert compile_() == 1
    err = capsys.readouterr().err
    assert err.startswith(f"arcflow compile: error: student.toml: {message}")
    assert err.count("\n") == 1


def test_unknown_students(place, capsys):
    presets = "flux, flux-dev, flux-schnell, qwen, qwen-image"
    for name, message in (
        ("fluks", f"'fluks' is neither a preset nor a .toml file; did you mean 'flux'?; the presets are {presets}"),
        ("some.toml", f"some.toml does not exist; the presets are {presets}"),
    ):
        assert cli.main(["compile", name]) == 1
        assert capsys.readouterr().err == f"arcflow compile: error: {message}\n"


def test_a_base_without_an_adapter(place, capsys):
    """Calibration gets the schedule of the export, unless it has its own."""
    Path("student.toml").write_text(
        'name = "some"\nbase = "base"\n[arguments]\n'
        'export = "--steps 8,4 --schedule lightning --max-px 512"\ncalibrate = "--limit 3 --schedule=base"'
    )
    assert compile_() == 0
    assert log() == list(STAGES)
    ran = {name: " ".join(words) for name, words in commands(capsys).items()}
    base = f"--base {place / 'base'}"
    assert ran["export"].startswith(f"export {base} --dtype bfloat16 --steps 8,4 --schedule lightning --max-px 512 ")
    assert ran["calibrate"].startswith(f"calibrate {base} --limit 3 --schedule=base --num-inference-steps 8 --out")


def test_a_base_that_is_named_alone(place, capsys):
    words = ["compile", "--base", "base", "--precision", "fp32", "--backend", "onnxruntime"]
    assert cli.main(words) == 0
    assert log() == ["export"]
    assert f"export --base {place / 'base'} --dtype float32 --out out/base-fp32" in capsys.readouterr().out
    assert cli.main([*words, "--dry-run"]) == 0
    assert "export  done" in capsys.readouterr().out
    for wrong in (["compile"], ["compile", "student.toml", "--base", "base"]):
        assert cli.main(wrong) == 2
        assert capsys.readouterr().err == (
            "arcflow compile: error: give either STUDENT or --base, such as: arcflow compile flux, or --base DIR\n"
        )


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "qwen-image"])
def test_bases_that_come_with_the_package(name):
    student = load_student_file(name)
    assert student.name == name and student.adapter is None
    assert student.checkpoints == (student.base,)


def test_mistakes_are_found_before_the_first_stage(place, capsys):
    cases = [
        (["--limit", "0"], 2, "--limit must be at least 1, got 0"),
        (["--size", "64"], 2, "argument --size: must be HEIGHTxWIDTH such as 1024x1024, got '64'"),
        (
            ["--target", "sm98"],
            2,
            "--target must be among sm75, sm80, sm86, sm89, sm120, sm121 for tensorrt-rtx, got 'sm98'",
        ),
        (["--target", "sm86"], 2, "--precision fp8 must be built for sm89 or newer, got sm86"),
        (
            ["--precision", "nvfp4", "--target", "sm89"],
            2,
            "--precision nvfp4 must be built for sm100 or newer, got sm89",
        ),
        (
            ["--precision", "nvfp4", "--backend", "onnxruntime"],
            2,
            "--precision nvfp4 runs on GPUs only, got --backend onnxruntime; give --backend tensorrt-rtx and a "
            "--target, or --precision int8",
        ),
        (["--policy", "flix"], 1, "--policy: 'flix' is neither a preset nor a .toml file; did you mean 'flux'?"),
    ]
    for arguments, code, message in cases:
        assert compile_(*arguments) == code
        assert f"arcflow compile: error: {message}" in capsys.readouterr().err
    Path("student.toml").write_text(STUDENT + 'verify = "--hieght 64"')
    assert compile_() == 2
    assert capsys.readouterr().err.endswith(
        "arcflow verify: error: unknown argument '--hieght'; did you mean --height?\n"
    )
    assert log() == []
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_made(place, capsys):
    Path("file").touch()
    assert compile_("--out", "file/out") == 2
    assert capsys.readouterr().err == (
        "arcflow compile: error: --out: file/out cannot be created (Not a directory); give another folder\n"
    )


def test_the_command_itself_is_light(place):
    """It waits for hours beside stages that need the memory."""
    program = (
        "import sys; from arcflow_export.pipeline import process; from arcflow_runtime import cli\n"
        f"process.COMMAND = {process.COMMAND!r}\n"
        "assert cli.main(['compile', 'student.toml', '--precision', 'fp8']) == 0\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'onnx', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


@pytest.fixture
def traced(request, tmp_path, monkeypatch):
    """The real stages, which share the traces of the other tests."""
    cache = getattr(request.config, "cache", None)
    monkeypatch.setenv("TRACES", str(cache.mkdir("traces") if cache else tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(HERE / "traced_stage.py")))


@pytest.mark.slow
def test_the_shapes_student_for_real(traced, tmp_path, capfd):
    arguments = ["compile", str(SHAPES / "student.toml"), "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert cli.main(["inspect", str(tmp_path / "shapes-fp32"), "--check"]) == 0
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "shapes-fp32").rglob("*")}
    capfd.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    (stage,) = json.loads(capfd.readouterr().out)["stages"]
    assert (stage["stage"], stage["state"]) == ("export", "done")
    assert stage["seconds"] > 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "shapes-fp32").rglob("*")} == written


@pytest.mark.slow
def test_a_base_for_real(traced, tmp_path, capfd):
    """Qwen-Image itself, guided by a negative prompt, from its checkpoint to FP8 for a CPU."""
    (tmp_path / "base").symlink_to(HERE / "golden" / "qwen-tiny" / "base")
    few = "--prompts shapes --limit 2"
    (tmp_path / "student.toml").write_text(
        'name = "teacher"\nbase = "base"\n[arguments]\nexport = "--steps 3 --max-px 256 --max-sequence-length 160"\n'
        f'calibrate = "{few} --sizes 64x64"\nverify = "{few} --height 64 --width 64"\n'
    )
    student, out = str(tmp_path / "student.toml"), str(tmp_path / "out")
    words = [student, "--precision", "fp8", "--backend", "onnxruntime", "--out", out]
    assert cli.main(["plan", *words, "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)["stages"]
    assert [s["stage"] for s in planned] == ["export", "calibrate", "quantize", "verify"]
    assert all(s["seconds"] > 0 for s in planned)
    assert cli.main(["compile", *words]) == 0
    said = capfd.readouterr().out
    assert "PASSED: every threshold holds" in said and "step 2" in said
    scales = json.loads((tmp_path / "out" / "teacher-scales.json").read_text())
    assert (scales["num_inference_steps"], scales["negative_prompts"], scales["true_cfg_scale"]) == (3, [" "], 4.0)
    bundle = Bundle.open(tmp_path / "out" / "teacher-fp8")
    assert bundle.manifest.sampler == "linear" and bundle.manifest.parts["backbone"].quantization is not None
