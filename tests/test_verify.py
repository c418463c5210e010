"""`arcflow verify` passes a bundle of its student, in both precisions, and fails one of another."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.drift.comparable import check_student
from arcflow_export.errors import ExportError
from arcflow_export.verify.verify import FLOAT32_BOUND, IMAGE_BOUND
from arcflow_runtime import cli
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Source
from tests.checkpoints import ADAPTER_FILE, make_style, write_adapter
from tests.conftest import GOLDEN, golden_student
from tests.fake_bundle import edit_manifest, make_bundle

BASE, ADAPTER = GOLDEN / "flux-tiny" / "base", GOLDEN / "flux-tiny" / "adapter"


def verify(bundle, *arguments, adapter=ADAPTER):
    sources = ["--base", str(BASE), "--adapter", str(adapter), "--width", "32", "--height", "48"]
    return cli.main(["verify", str(bundle), *sources, "--prompt", "a red circle", *arguments])


@pytest.fixture
def float32(bundles):
    return bundles("flux-tiny", opset=23, steps=(2, 4))


@pytest.fixture
def unchecked(monkeypatch):
    """Compares with other weights than the bundle's, so that it is the numbers that must tell them apart."""
    monkeypatch.setattr("arcflow_export.drift.comparable.check_student", lambda *_: None)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Whatever is refused is refused before anything is loaded."""
    monkeypatch.setattr("arcflow_export.verify.verify.verify_bundle", lambda *_: pytest.fail("it must not be run"))


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


@pytest.mark.slow
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
        pytest.param(
            *("time_text_embed.timestep_embedder.linear_1.lora_A.weight", {"step 1 means"}), marks=pytest.mark.slow
        ),
    ],
)
def test_a_bundle_of_another_adapter(unchecked, float32, tmp_path, capsys, key, wrong):
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


@pytest.mark.slow
def test_a_bfloat16_bundle_of_another_adapter(unchecked, command_run, tmp_path, capsys):
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


def test_failures_are_marked(unchecked, float32, tmp_path, capsys):
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    tensors = load_file(ADAPTER / ADAPTER_FILE)
    tensors["proj_out_loggamma.bias"] += 0.01
    write_adapter(adapter, tensors)
    assert verify(float32, adapter=adapter) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[1:4] for line in lines if line.endswith("  FAILED")]
    assert {("step", "0", "loggammas"), ("step", "1", "loggammas")} <= set(map(tuple, failed))
    assert lines[-1] == f"{12 - len(failed)} of 12 within bounds, {len(failed)} FAILED"


def test_another_student_is_named(nothing_runs, float32, tmp_path, capsys):
    """By the digests in the manifest, before anything is loaded; names alone would not tell them apart."""
    made = Bundle.open(float32).manifest.provenance
    other = shutil.copytree(ADAPTER, tmp_path / "adapter")
    tensors = load_file(ADAPTER / ADAPTER_FILE)
    tensors["proj_out_loggamma.bias"] += 0.01
    write_adapter(other, tensors)
    given = golden_student("flux-tiny").sources
    assert verify(float32, adapter=other) == 1
    changed = TensorIndex.open(other, "adapter").digest()
    differs = f"adapter adapter (sha256 {made.adapter.sha256[:12]}), not from adapter (sha256 {changed[:12]})"
    advice = "give the base, adapter and LoRAs it was made from"
    assert capsys.readouterr().err == f"arcflow verify: error: {float32} was made from {differs}; {advice}\n"

    style = make_style(tmp_path / "style.safetensors", {"transformer.transformer_blocks.0.attn.to_q": (64, 64)})
    assert verify(float32, "--lora", f"{style}:0.5", adapter=other) == 1
    digest = TensorIndex.open(style, "LoRA").digest()
    lora = f"style.safetensors (sha256 {digest[:12]}, scale 0.5)"
    assert capsys.readouterr().err == (
        f"arcflow verify: error: {float32} was made from {differs}; from no LoRA, not from LoRA {lora}; {advice}\n"
    )
    assert made.base == given[0] and made.loras == ()


def test_scale_of_a_lora_and_the_base_are_compared(float32):
    bundle = Bundle.open(float32)
    m = bundle.manifest
    lora = Source("style", None, "ab" * 32, 1.0)
    made = dataclasses.replace(m.provenance, loras=(lora,))
    bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(m, provenance=made))
    check_student(bundle, (made.base, made.adapter, (lora,)))
    check_student(bundle, (dataclasses.replace(made.base, name="elsewhere"), made.adapter, (lora,)))
    for given, message in (
        (
            (made.base, made.adapter, (dataclasses.replace(lora, scale=0.5),)),
            "LoRA style (sha256 abababababab, scale 1), not from LoRA style (sha256 abababababab, scale 0.5)",
        ),
        ((made.base, made.adapter, ()), "LoRA style (sha256 abababababab, scale 1), not from no LoRA"),
        (
            (Source("other", None, "cd" * 32), made.adapter, (lora,)),
            f"base base (sha256 {made.base.sha256[:12]}), not from other (sha256 cdcdcdcdcdcd)",
        ),
    ):
        with pytest.raises(ExportError) as error:
            check_student(bundle, given)
        assert str(error.value) == (
            f"{float32} was made from {message}; give the base, adapter and LoRAs it was made from"
        )


def test_a_quantised_bundle_is_pointed_to_the_gate(nothing_runs, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle")
    digest = "0" * 64
    layers = {"format": "fp8_e4m3", "layers": ["a"], "policy": digest, "scales": digest}
    edit_manifest(bundle, parts__backbone__quantization=layers)
    assert verify(bundle) == 2
    assert capsys.readouterr().err == (
        f"arcflow verify: error: {bundle} is quantised (backbone) and cannot be compared with torch; compare it with "
        f"the bundle it was made from: arcflow verify {bundle} --against BUNDLE\n"
    )


@pytest.mark.parametrize(("largest", "size"), [(64, (64, 64)), (1024, (64, 96))])
def test_default_sizes_are_sizes_of_the_bundle(tmp_path, monkeypatch, largest, size):
    bundle = make_bundle(tmp_path / "bundle")
    edit_manifest(bundle, ranges__height_px__max=largest, ranges__width_px__max=largest)
    m = Bundle.open(bundle).manifest
    sources = (m.provenance.base, m.provenance.adapter, ())
    student = SimpleNamespace(family=m.family, sources=sources, vae_source=None)
    monkeypatch.setattr("arcflow_export.commands.verify.open_student", lambda _: student)
    monkeypatch.setattr("arcflow_export.commands.verify.announce", lambda *_: None)
    cases = []
    monkeypatch.setattr(
        "arcflow_export.verify.verify.verify_bundle", lambda b, s, wanted, *_: cases.extend(wanted) or []
    )
    assert cli.main(["verify", str(bundle), "--base", "x", "--adapter", "y"]) == 0
    assert {(case.height, case.width) for case in cases} == {size}


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


@pytest.mark.slow
def test_a_lora_that_the_exporter_reads_wrongly(tmp_path, monkeypatch, capsys):
    """verify reads the file by itself, so a wrong scale in the bundle shows in its numbers."""
    from arcflow_runtime.lora import scales
    from tests.lora_files import FILES

    lora = f"{FILES['kohya, text encoders']().write(tmp_path)}:0.05"
    student = ["--base", str(BASE), "--adapter", str(ADAPTER), "--lora", lora]
    right = scales.Scales.of
    for factor, name in ((1.0, "right"), (2.0, "wrong")):

        def scale(*args, factor=factor):
            found = right(*args)
            return dataclasses.replace(found, value=factor * found.value)

        with monkeypatch.context() as patch:
            patch.setattr(scales.Scales, "of", scale)
            assert cli.main(["export", *student, "--out", str(tmp_path / name)]) == 0
        capsys.readouterr()
        assert verify(tmp_path / name, "--lora", lora, "--json") == (0 if name == "right" else 1)
        rows = {row["what"]: row["passed"] for row in json.loads(capsys.readouterr().out)["rows"]}
        parts = ("text states", "pooled text", "step 0 means")
        assert [rows[part] for part in parts] == [name == "right"] * 3
