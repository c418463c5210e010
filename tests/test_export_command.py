"""`arcflow export` as a user types it: what it prints, what it refuses, and that it then leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import sys

import pytest

from arcflow_export.progress import ByteBars
from arcflow_runtime import cli
from tests.checkpoints import make_style
from tests.conftest import GOLDEN

FLUX = ["--base", str(GOLDEN / "flux-tiny" / "base"), "--adapter", str(GOLDEN / "flux-tiny" / "adapter")]
QWEN = [a.replace("flux-tiny", "qwen-tiny") for a in FLUX]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(*arguments, student=FLUX):
    return cli.main(["export", *student, *arguments])


def test_json_result(command_run):
    assert command_run.code == 0
    assert re.fullmatch(r"export: about .+, .+ GiB of memory\n", command_run.err)
    result = json.loads(command_run.out)
    assert result["out"] == str(command_run.bundle)
    assert result["family"] == "flux"
    stages = [s["stage"] for s in result["stages"]]
    parts = ["text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder"]
    assert stages == [f"{p}: {what}" for p in parts for what in ("tracing", "weights")] + ["tokenizers"]
    assert all(s["seconds"] >= 0 for s in result["stages"])
    for stage in result["stages"]:
        if stage["stage"].endswith("weights"):
            weights = command_run.bundle / f"{stage['stage'].split(':')[0]}.safetensors"
            assert stage["bytes"] <= weights.stat().st_size <= stage["bytes"] + (1 << 16)
    assert os.listdir(command_run.bundle.parent) == ["bundle"]


def test_files_are_those_of_the_manifest(command_run):
    manifest = json.loads((command_run.bundle / "manifest.json").read_text())
    assert {*manifest["files"], "manifest.json"} == set(os.listdir(command_run.bundle))
    assert (manifest["dtype"], manifest["reference_dtype"]) == ("bfloat16", "bfloat16")
    assert manifest["provenance"]["base"]["name"] == "base"


def test_dry_run(here, capsys):
    assert export("--out", "out", "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "base     base: flux, 553,920 parameters in the transformer"
    assert out.splitlines()[1].startswith("adapter  adapter: 16 LoRA linears of rank 8, 8 full tensors, K 16, P 4; ")
    assert "dry run: " in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith(" bytes of weights would be written to out")
    assert os.listdir() == []


def test_dry_run_as_json(here, capsys):
    assert export("--out", "out", "--dry-run", "--json", "--steps", "2,4", student=QWEN) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["parts"]) == ["text_encoder", "backbone", "vae_decoder"]
    assert plan["bytes"] == sum(p["bytes"] for p in plan["parts"].values())
    assert os.listdir() == []


def test_dry_run_names_the_loras(here, capsys):
    targets = {"transformer.transformer_blocks.0.attn.to_q": (64, 64), "transformer.proj_out": (64, 64)}
    make_style(here / "ink.safetensors", targets)
    assert export("--out", "out", "--dry-run", "--lora", "ink.safetensors:0.8") == 0
    out = capsys.readouterr().out
    assert "lora     ink.safetensors x 0.8: 1 linears of transformer\n" in out
    assert "         left out transformer.proj_out: it is a layer that the student's heads replace\n" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: --out"),
        (["--out", "o", "--steps", "0"], 2, "argument --steps: step counts must be between 1 and 1000, got '0'"),
        (["--out", "o", "--steps", "x"], 2, "argument --steps: must be whole numbers such as 2 or 2,4, got 'x'"),
        (["--out", "o", "--steps", "2,"], 2, "argument --steps: must be whole numbers such as 2 or 2,4, got '2,'"),
        (
            ["--out", "o", "--dtype", "float8"],
            2,
            "argument --dtype: invalid choice: 'float8' (choose from 'float32', 'bfloat16', 'float16')",
        ),
        (["--out", "o", "--opset", "21"], 2, "argument --opset: invalid choice: 21 (choose from 20, 23)"),
        (["--out", "o", "--max-px", "100"], 2, "--max-px must be a positive multiple of 16, got 100"),
        (["--out", "o", "--max-px", "0"], 2, "--max-px must be a positive multiple of 16, got 0"),
        (["--out", "o", "--max-sequence-length", "0"], 2, "--max-sequence-length must be at least 1, got 0"),
        (["--out", "o", "--dtpye", "float16"], 2, "unknown argument '--dtpye'; did you mean --dtype?"),
        (["--out", "no/o"], 1, "--out: {here}/no is not a directory; create it first"),
        (["--out", "."], 1, "--out: {here} exists and is not a bundle; it will not be overwritten, give another name"),
        (
            ["--out", "o", "--lora", "missing.safetensors"],
            1,
            "LoRA: 'missing.safetensors' is not a file or directory here, nor a hub id of the form 'owner/name'; "
            "check the spelling",
        ),
        (
            ["--out", "o", "--lora", "loras/missing.safetensors:0.5"],
            1,
            "LoRA: 'loras/missing.safetensors' is not a file or directory here, nor a hub id of the form 'owner/name'; "
            "check the spelling",
        ),
        (
            ["--out", "o", "--lora", "x:much"],
            2,
            "--lora must be PATH or PATH:SCALE with a number for SCALE, got 'x:much'",
        ),
        (
            ["--out", "o", "--lora", ":0.5"],
            1,
            "LoRA: the name is empty; give a directory or a hub id of the form 'owner/name'",
        ),
        (["--out", "o", "--base-subfolder", "bsae"], 1, "base checkpoint: {base} has no subfolder 'bsae'"),
    ],
)
def test_refused(here, capsys, arguments, code, message):
    assert export(*arguments) == code
    captured = capsys.readouterr()
    expected = message.format(here=here, base=FLUX[1])
    assert captured.err.endswith(f"arcflow export: error: {expected}\n")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert os.listdir() == []


def test_help_is_quick_and_complete(capsys):
    assert cli.main(["export", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.count("Merge a base checkpoint, an ArcFlow adapter and LoRAs") == 1
    for option in (
        "--base",
        "--adapter",
        "--lora",
        "--dtype",
        "--opset",
        "--steps",
        "--dry-run",
        "--json",
        "--offline",
    ):
        assert f"  {option} " in out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_and_silence_in_a_log(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with ByteBars() as bars:
            bars.stage("backbone: tracing", 0)
            bars.stage("backbone: weights", 2_000_000)
            bars.advance(2_000_000)
        assert ("backbone: weights: 100%" in stream.getvalue()) is shown
        assert ("backbone: tracing" in stream.getvalue()) is shown
        assert (stream.getvalue() == "") is not shown
        assert [s["stage"] for s in bars.stages] == ["backbone: tracing", "backbone: weights"]
