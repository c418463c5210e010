"""`arcflow verify` passes a bundle of its student, in both precisions, and fails one of another."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from arcflow_export.verify import FLOAT32_BOUND, IMAGE_BOUND
from arcflow_runtime import cli
from tests.checkpoints import ADAPTER_FILE, write_adapter
from tests.conftest import GOLDEN

BASE, ADAPTER = GOLDEN / "flux-tiny" / "base", GOLDEN / "flux-tiny" / "adapter"


def verify(bundle, *arguments, adapter=ADAPTER):
    sources = ["--base", str(BASE), "--adapter", str(adapter), "--width", "32", "--height", "48"]
    return cli.main(["verify", str(bundle), *sources, "--prompt", "a red circle", *arguments])


@pytest.fixture
def float32(bundles):
    return bundles("flux-tiny", opset=23, steps=(2, 4))


def test_float32(float32, capsys):
    assert verify(float32, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is True
    rows = {row["what"]: row for row in result["rows"]}
    heads = [f"step {i} {head}" for i in range(2) for head in ("means", "logweights", "loggammas")]
    ends = [f"end to end: {what}" for what in ("latents after step 0", "latents after step 1", "image")]
    assert list(rows) == ["text states", "pooled text", *heads, "vae image", *ends]
    for name, row in rows.items():
        assert row["bound"] == pytest.approx(IMAGE_BOUND if "image" in name else FLOAT32_BOUND)
        assert 0 <= row["error"] <= row["bound"]


def test_bfloat16(command_run, capsys):
    assert verify(command_run.bundle) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{'case':>4}  {'quantity':36}{'error':>10}{'bound':>10}"
    assert out.splitlines()[-1] == "12 of 12 within bounds"
    errors = [float(line.split()[-2]) for line in out.splitlines()[1:-1]]
    assert max(errors) > FLOAT32_BOUND, "bfloat16 arithmetic was not emulated"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("transformer_blocks.1.ff.net.2.lora_B.weight", {"step 0 means", "end to end: latents after step 1"}),
        ("time_text_embed.timestep_embedder.linear_1.lora_A.weight", {"step 1 means"}),
    ],
)
def test_a_bundle_of_another_adapter(float32, tmp_path, capsys, key, wrong):
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    tensors = load_file(ADAPTER / ADAPTER_FILE)
    [name] = [k for k in tensors if k.endswith(key)]
    tensors[name] = tensors[name] * 1.01 + 0.001
    write_adapter(adapter, tensors)
    assert verify(float32, "--json", adapter=adapter) == 1
    result = json.loads(capsys.readouterr().out)
    failed = {row["what"] for row in result["rows"] if not row["passed"]}
    assert result["passed"] is False
    assert wrong <= failed
    assert not failed & {"text states", "pooled text", "vae image"}, "these do not depend on the adapter"


def test_a_bfloat16_bundle_of_another_adapter(command_run, tmp_path, capsys):
    """One LoRA half as strong again moves the heads by more than rounding can."""
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    tensors = load_file(ADAPTER / ADAPTER_FILE)
    [name] = [k for k in tensors if k.endswith("transformer_blocks.1.ff.net.2.lora_B.weight")]
    tensors[name] = tensors[name] * 1.5
    write_adapter(adapter, tensors)
    assert verify(command_run.bundle, "--json", adapter=adapter) == 1
    failed = {row["what"] for row in json.loads(capsys.readouterr().out)["rows"] if not row["passed"]}
    assert {"step 0 means", "step 1 means"} <= failed
    assert not failed & {"text states", "pooled text", "vae image"}, "these do not depend on the adapter"


def test_failures_are_marked(float32, tmp_path, capsys):
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    tensors = load_file(ADAPTER / ADAPTER_FILE)
    tensors["proj_out_loggamma.bias"] += 0.01
    write_adapter(adapter, tensors)
    assert verify(float32, adapter=adapter) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[1:4] for line in lines if line.endswith("  FAILED")]
    assert {("step", "0", "loggammas"), ("step", "1", "loggammas")} <= set(map(tuple, failed))
    assert lines[-1] == f"{12 - len(failed)} of 12 within bounds, {len(failed)} FAILED"


def test_bad_requests(float32, capsys):
    assert verify(float32, "--steps", "0") == 2
    assert capsys.readouterr().err == ("arcflow verify: error: num_inference_steps must be between 1 and 1000, got 0\n")
    assert verify(float32.parent / "none") == 1
    assert "is not a directory; give the directory that `arcflow export --out` wrote" in capsys.readouterr().err


def test_another_family(float32, capsys):
    golden = GOLDEN / "qwen-tiny"
    assert cli.main(["verify", str(float32), "--base", str(golden / "base"), "--adapter", str(golden / "adapter")]) == 1
    assert capsys.readouterr().err == (
        f"arcflow verify: error: {float32} is a flux bundle, the student given is qwen-image; "
        "give the base and adapter it was made from\n"
    )
