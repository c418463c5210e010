"""Builds bundles with LoRA slots with the real TensorRT-RTX builder, and checks the plans' kernels; needs no GPU."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from arcflow_runtime import Bundle, cli
from tests.fp8 import make_scales, quantize
from tests.plans import PADDING, read_plan

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[tensorrt-rtx]'", exc_type=ImportError
)

BLOCK, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"


def built(root, target, folder):
    """The plan of the backbone, as (name of a product -> dtypes of its two operands, names of kernels)."""
    copy = Path(shutil.copytree(root, folder / "bundle"))
    with redirect_stdout(io.StringIO()) as out:
        command = ["build", copy, "--backend", "tensorrt-rtx", "--target", target, "--parts", "backbone", "--json"]
        assert cli.main([*map(str, command), "--resolutions", "64"]) == 0
    (row,) = json.loads(out.getvalue())["engines"]
    record = json.loads((copy / "engines" / f"backbone-tensorrt-rtx-{target}.json").read_text())
    products, kernels = read_plan(Path(row["file"]))
    return products, kernels, record["key"]["profiles"][0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm89", "sm120"])
@pytest.mark.parametrize("fp8", [True, False])
def test_slots_add_two_products_each_and_change_no_other(bundles, tmp_path, fp8, target):
    plain = bundles("flux-tiny", dtype="bfloat16")
    slotted = bundles("flux-tiny", dtype="bfloat16", lora_slots=("*",))
    if fp8:
        for root, name in ((plain, "plain8"), (slotted, "slotted8")):
            quantize(root, tmp_path / name, make_scales(Bundle.open(root), lambda *_: 4.0))
        plain, slotted = tmp_path / "plain8", tmp_path / "slotted8"
    layers = Bundle.open(slotted).manifest.slots()["backbone"].layers
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before, _, _ = built(plain, target, tmp_path / "a")
    after, kernels, profile = built(slotted, target, tmp_path / "b")
    branches = {f"{name}.lora_{way}" for name in layers for way in ("down", "up")}
    # The products by weights are the same, and still joined where they read the same tensor.
    assert {name: kind for name, kind in after.items() if name not in branches} == before
    # For sm120 the builder joins no FP8 products, with or without slots.
    if (fp8, target) != (True, "sm120"):
        assert [name for name in before if f"{BLOCK}.to_q" in name.split("+")] == [
            "+".join(f"{BLOCK}.to_{x}" for x in "vkq")
        ]
        assert any({f"{SINGLE}.proj_mlp", f"{SINGLE}.attn.to_q"} <= set(name.split("+")) for name in before)
    assert branches == after.keys() - before.keys()
    assert {after[name] for name in branches} == {("bf16", "bf16")}
    quantized = Bundle.open(slotted).manifest.parts["backbone"].quantization
    assert quantized is None or list(before.values()).count(("fp8_e4m3", "fp8_e4m3")) > 20
    # With a rank that is one axis of any length, the builder pads the slots' operands.
    assert not [name for name in kernels if PADDING in name]
    sizes = layers[f"{BLOCK}.to_q"]
    assert profile[f"{BLOCK}.to_q.lora_a"] == {
        "min": [sizes.in_features, 1, 8],
        "opt": [sizes.in_features, 2, 8],
        "max": [sizes.in_features, 16, 8],
    }
    assert profile[f"{BLOCK}.to_q.lora_b"]["max"] == [16, 8, sizes.out_features]
