"""A precision for each part: what the options mean, what the bundle holds, and that it draws what torch draws."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from arcflow_export.export.bake import bake_modulation
from arcflow_export.export.export import plan_export
from arcflow_export.options import ExportOptions
from arcflow_export.student.cast import cast_linears, keep_float32
from arcflow_export.student.keep import ATTENTION_INPUTS, FLOAT16_MAX
from arcflow_export.student.reference import round_randomly
from arcflow_export.verify.verify import VerifyCase, _bound, verify_bundle
from arcflow_runtime import cli
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.maths.dtypes import round_to
from tests.conftest import GOLDEN, golden_student

FLUX = ["--base", str(GOLDEN / "flux-tiny" / "base"), "--adapter", str(GOLDEN / "flux-tiny" / "adapter")]
QWEN = [a.replace("flux-tiny", "qwen-tiny") for a in FLUX]
#: Every precision in one bundle. The kept linears: a head, attention's inputs with a norm behind and without, a linear
#: that the adapter's LoRA is merged into, and one of CLIP's, whose layer norms have weights.
KEPT = (
    "proj_out_means",
    "transformer_blocks.0.attn.to_[qv]",
    "single_transformer_blocks.0.proj_mlp",
    "text_model.encoder.layers.0.self_attn.*_proj",
)
MIXED = {
    "dtype": "bfloat16",
    "precision": (("text_encoder_2", "float32"), ("conditioner", "float16"), ("vae_decoder", "float16")),
    "keep_float32": KEPT,
}


def run(capsys, *arguments):
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_precision_of_each_part():
    options = ExportOptions("float16", precision=(("text_encoder_2", "bfloat16"),))
    of = {part: options.part_dtype(part) for part in ("text_encoder", "text_encoder_2", "backbone", "vae_decoder")}
    assert of == {
        "text_encoder": "float16",
        "text_encoder_2": "bfloat16",
        "backbone": "float16",
        "vae_decoder": "float32",  # overflows in float16; left out unless asked for
    }
    assert ExportOptions("float16", precision=(("vae_decoder", "float16"),)).part_dtype("vae_decoder") == "float16"


@pytest.mark.parametrize(
    ("dtype", "precision", "reference"),
    [
        ("float32", (), "float32"),
        ("float32", (("text_encoder_2", "bfloat16"), ("vae_decoder", "float16")), "float32"),
        ("float32", (("conditioner", "bfloat16"),), "bfloat16"),
        ("bfloat16", (("backbone", "float32"),), "bfloat16"),
        ("bfloat16", (("backbone", "float32"), ("conditioner", "float32")), "float32"),
        ("float16", (), "bfloat16"),
    ],
)
def test_reference_dtype_follows_the_transformer(dtype, precision, reference):
    assert ExportOptions(dtype, precision=precision).reference_dtype == reference


def test_the_command_takes_short_names_lists_and_repeats(capsys, tmp_path):
    arguments = [
        "--dtype",
        "bf16",
        "--precision",
        "text_encoder_2=fp32, vae=fp16",
        "--precision",
        "conditioner=float16",
    ]
    arguments += ["--keep-float32", f"{KEPT[0]},{KEPT[1]}", "--keep-float32", KEPT[2]]
    code, out, err = run(capsys, "export", *FLUX, *arguments, "--out", tmp_path / "o", "--dry-run", "--json")
    assert code == 0, err
    parts = json.loads(out)["parts"]
    assert {name: part["precision"] for name, part in parts.items()} == {
        "text_encoder": "bfloat16",
        "text_encoder_2": "float32",
        "conditioner": "float16",
        "backbone": "bfloat16",
        "vae_decoder": "float16",
    }
    assert parts["backbone"]["float32_layers"] == [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.0.proj_mlp",
        "proj_out_means",
    ]
    code, out, _ = run(capsys, "export", *FLUX, *arguments, "--out", tmp_path / "o", "--dry-run")
    assert "bfloat16, 4 linears in float32\n" in out


def test_t5_keeps_its_known_overflows_in_float32():
    plan = plan_export(golden_student("flux-tiny"), ExportOptions("float16"))
    kept = {p.part.name: p.float32_layers for p in plan.parts}
    assert kept["text_encoder_2"] and all(name.endswith(".DenseReluDense.wo") for name in kept["text_encoder_2"])
    assert not any(layers for name, layers in kept.items() if name != "text_encoder_2")


PARTS = "text_encoder, text_encoder_2, conditioner, backbone, vae_decoder"


@pytest.mark.parametrize(
    ("student", "arguments", "message"),
    [
        (
            FLUX,
            ["--precision", "backbone"],
            "--precision must be PART=DTYPE such as text_encoder_2=bf16, got 'backbone'",
        ),
        (
            FLUX,
            ["--precision", "text_encoder2=bf16"],
            f"--precision: PART must be one of {PARTS}, got 'text_encoder2'; did you mean text_encoder_2?",
        ),
        (
            FLUX,
            ["--precision", "backbone=float61"],
            "--precision: backbone must be one of float32, bfloat16, float16, got 'float61'; did you mean float16?",
        ),
        (
            FLUX,
            ["--precision", "backbone=fp8"],
            "--precision: backbone=fp8: an export cannot write FP8; use `arcflow quantize` afterwards",
        ),
        (
            FLUX,
            ["--precision", "vae=fp16", "--precision", "vae_decoder=fp32"],
            "--precision: vae_decoder is given as float16 and as float32; choose one",
        ),
        (
            FLUX,
            ["--precision", "backbone=bf16,,"],
            "--precision must be names separated by commas, got 'backbone=bf16,,'",
        ),
        (
            QWEN,
            ["--precision", "text_encoder_2=bf16"],
            "--precision: a qwen-image bundle has the parts text_encoder, conditioner, backbone, vae_decoder, "
            "got 'text_encoder_2'",
        ),
        (
            FLUX,
            ["--dtype", "fp16", "--keep-float32", "proj_out_mean"],
            "--keep-float32: 'proj_out_mean' matches no linear of a part in bfloat16 or float16 "
            "(text_encoder, text_encoder_2, conditioner, backbone); did you mean proj_out_means?",
        ),
        (
            FLUX,
            ["--precision", "conditioner=bf16", "--keep-float32", "proj_out_means"],
            "--keep-float32: 'proj_out_means' matches no linear of a part in bfloat16 or float16 (conditioner); "
            "backbone is in float32 already",
        ),
        (
            FLUX,
            ["--precision", "vae=fp16", "--keep-float32", "decoder.mid_block.*"],
            "--keep-float32: 'decoder.mid_block.*' matches no linear of a part in bfloat16 or float16 (none); "
            "keep the decoder as a whole with --precision vae_decoder=float32",
        ),
        (
            FLUX,
            ["--scales", "none.json"],
            "--scales: no part is in float16, so nothing can overflow; leave the option out",
        ),
    ],
)
def test_refused(capsys, tmp_path, student, arguments, message):
    code, out, err = run(capsys, "export", *student, *arguments, "--out", tmp_path / "o")
    assert (code, out, err) == (2, "", f"arcflow export: error: {message}\n")
    assert not (tmp_path / "o").exists()


def test_scales_keep_what_comes_near_the_limit(capsys, tmp_path):
    scales = pytest.importorskip("arcflow_export.formats.scales", reason="the calibration package is not here")
    student = golden_student("flux-tiny")
    base, adapter, loras = student.sources
    limit = FLOAT16_MAX / 2
    seen = {
        "transformer_blocks.0.ff.net.2": (1.0, limit * 1.01),
        "transformer_blocks.1.ff.net.2": (limit * 0.99, 1.0),
        "x_embedder": None,
    }
    ranges = {name: scales.ActivationRange((1.0, 1.0), 8, out) for name, out in seen.items()}
    made = scales.Scales(
        base=base,
        adapter=adapter,
        loras=loras,
        family="flux",
        method="max",
        percentile=None,
        prompts=scales.PromptSet("test", "0" * 64, 1),
        num_inference_steps=2,
        sizes=((64, 64),),
        guidance_scale=3.5,
        seed=0,
        tools={},
        parts={"backbone": ranges},
    )
    made.save(tmp_path / "scales.json")
    arguments = ("--scales", tmp_path / "scales.json", "--out", tmp_path / "o", "--dry-run", "--json")
    code, out, err = run(capsys, "export", *FLUX, "--dtype", "fp16", *arguments)
    assert code == 0, err
    assert json.loads(out)["parts"]["backbone"]["float32_layers"] == ["transformer_blocks.0.ff.net.2"]
    code, _, err = run(capsys, "export", *QWEN, "--dtype", "fp16", *arguments)
    assert code == 1
    assert "they belong to a flux student, the bundle is qwen-image" in err


@pytest.fixture
def mixed(bundles):
    return bundles("flux-tiny", **MIXED)


@pytest.mark.slow
def test_the_bundle_says_and_holds_each_precision(mixed, capsys):
    manifest = Bundle.open(mixed, "full").manifest
    assert (manifest.dtype, manifest.reference_dtype) == ("bfloat16", "bfloat16")
    io = {name: (p.inputs[-1].dtype, p.outputs[0].dtype) for name, p in manifest.parts.items()}
    assert io["text_encoder_2"] == ("int64", "float32")
    assert io["conditioner"] == ("float16", "float16")
    assert [i.dtype for i in manifest.parts["backbone"].inputs[:3]] == ["bfloat16"] * 3
    with safe_open(mixed / "backbone.safetensors", "pt") as f:
        dtypes = {key: f.get_slice(key).get_dtype() for key in f.keys()}  # noqa: SIM118
    wide = {key for key, dtype in dtypes.items() if dtype == "F32"}
    assert {"proj_out_means.weight", "proj_out_means.bias", "transformer_blocks.0.attn.to_v.weight"} <= wide
    assert dtypes["proj_out_logweights.weight"] == dtypes["transformer_blocks.0.attn.to_k.weight"] == "BF16"
    code, out, _ = run(capsys, "inspect", mixed)
    assert code == 0
    others = "text_encoder_2 in float32, conditioner in float16, vae_decoder in float16"
    assert f"dtype     bfloat16, {others}, conditioning as the reference in bfloat16, opset 23\n" in out


@pytest.mark.slow
def test_a_mixed_bundle_draws_what_torch_draws(mixed):
    rows = verify_bundle(Bundle.open(mixed), golden_student("flux-tiny"), [VerifyCase("a red circle", 48, 32, 2)])
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    bounds = {row.what: row.bound for row in rows}
    assert bounds["text states"] == 1e-4, "a float32 part is held to float32"
    assert bounds["pooled text"] > 1e-4
    assert {what for what in bounds if "reach" in what} == {
        "conditioner: reach into float16",
        "vae_decoder: reach into float16",
    }


def test_baked_modulation_has_both_precisions():
    plan = plan_export(golden_student("qwen-tiny"), ExportOptions("bfloat16", precision=(("conditioner", "float32"),)))
    timesteps = torch.tensor([1000.0, 761.71875])
    source = plan.student.source("conditioner")
    exact = bake_modulation(plan.baked, source, timesteps, torch.float32)[0].numpy()
    rounded = bake_modulation(plan.baked, source, timesteps, torch.bfloat16)[0].numpy()
    assert np.array_equal(round_to(exact, "bfloat16"), rounded)
    assert not np.array_equal(exact, rounded)


def test_torch_keeps_the_same_linears_in_float32():
    """A kept linear's output stays in float32 but for attention's; a norm brings the dtype back."""
    root = torch.nn.Sequential()
    root.add_module("wide", torch.nn.Linear(4, 4))
    root.add_module("norm", torch.nn.LayerNorm(4))
    root.add_module("to_v", torch.nn.Linear(4, 4))
    root.to(torch.float16)
    with torch.no_grad():
        root.wide.weight.fill_(60000)
    cast_linears(root)
    keep_float32(root, ["wide", "to_v"], torch.float16)
    seen = {}
    for name, module in root.named_children():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    root(torch.ones(2, 4, dtype=torch.float16))
    assert {name: out.dtype for name, out in seen.items()} == {
        "wide": torch.float32,
        "norm": torch.float16,
        "to_v": torch.float16,
    }
    assert seen["wide"].max() > FLOAT16_MAX and seen["norm"].isfinite().all()
    assert "to_v" in ATTENTION_INPUTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_rounding_gives_a_neighbour_and_keeps_the_mean(dtype):
    x = torch.full((200_000,), 1.0) + torch.finfo(dtype).eps / 4
    got = round_randomly(x, dtype, torch.Generator().manual_seed(0)).double()
    assert set(got.tolist()) == {1.0, 1.0 + torch.finfo(dtype).eps}
    # A quarter goes up: a binomial share, within five of its standard deviations.
    share = (got > 1).double().mean().item()
    assert abs(share - 0.25) <= 5 * (0.25 * 0.75 / len(x)) ** 0.5
    assert torch.equal(round_randomly(x, dtype, None), x.to(dtype))
    assert torch.equal(round_randomly(got.float(), dtype, torch.Generator()).double(), got), "exact numbers stay"


def test_bound_is_what_another_run_may_reach():
    assert _bound([0.01]) == pytest.approx(0.02)
    assert _bound([0.01] * 4) == pytest.approx(0.02)
    squares = np.square([0.01, 0.02, 0.03, 0.04])
    expected = 2 * np.sqrt(squares.mean() + 3 * np.std(squares, ddof=1) * np.sqrt(1.25))
    assert _bound([0.01, 0.02, 0.03, 0.04]) == pytest.approx(expected)
    assert np.isnan(_bound([np.nan, 0.01]))
