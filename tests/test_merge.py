"""W' = W + sum_i scale_i * B_i A_i: against float64, in blocks of rows, and what a bad weight says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from arcflow_export.checkpoint import merge
from arcflow_export.checkpoint.adapter import LoraPair
from arcflow_export.checkpoint.merge import MergedWeights, PlainWeights, cast
from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.errors import SourceError

OUT, IN, RANK = 48, 40, 8


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def stored(request, tmp_path):
    """Files in one dtype: base w and v, adapter v, and factors of two LoRAs; with the tensors in float64."""
    g = torch.Generator().manual_seed(0)
    base = {"w.weight": torch.randn(OUT, IN, generator=g), "v.weight": torch.randn(OUT, IN, generator=g)}
    base |= {"w.bias": torch.randn(OUT, generator=g)}
    lora = {"a0": (RANK, IN), "b0": (OUT, RANK), "a1": (2, IN), "b1": (OUT, 2), "v.weight": (OUT, IN)}
    tensors = {k: torch.randn(s, generator=g) for k, s in lora.items()}
    for name, values in (("base", base), ("lora", tensors)):
        save_file({k: v.to(request.param) for k, v in values.items()}, tmp_path / f"{name}.safetensors")
    return TensorIndex.open(tmp_path / "base.safetensors", "base"), TensorIndex.open(
        tmp_path / "lora.safetensors", "adapter"
    )


def merged(stored, scales=(1.0, -0.75)) -> MergedWeights:
    base, lora = stored
    pairs = [LoraPair(lora[f"a{i}"], lora[f"b{i}"], s) for i, s in enumerate(scales)]
    return MergedWeights(base, {"v.weight": lora["v.weight"]}, {"w": pairs, "v": pairs[:1]})


def whole(weights, key, dtype):
    return torch.cat(list(weights.blocks(key, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [1 << 27, 5 * IN * 4, 1], ids=["whole", "5 rows", "1 row"])
def test_against_float64(stored, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(merge, "BLOCK_BYTES", block_bytes)
    base, lora = stored
    a0, b0, a1, b1 = (lora[k].read().double() for k in ("a0", "b0", "a1", "b1"))
    w = base["w.weight"].read().double()
    expected = w + b0 @ a0 - 0.75 * (b1 @ a1)
    weights = merged(stored)
    rows = [len(b) for b in weights.blocks("w.weight", dtype)]
    assert sum(rows) == OUT
    assert len(rows) == {1 << 27: 1, 5 * IN * 4: 10, 1: OUT}[block_bytes]
    got = whole(weights, "w.weight", dtype)
    assert got.dtype == dtype
    # A sum of RANK + 2 products and W in float32, each step rounded by at most half a unit of the sum of magnitudes;
    # then one rounding to `dtype`. A second rounding (of BA, say) would be up to as large again.
    magnitude = w.abs() + b0.abs() @ a0.abs() + 0.75 * (b1.abs() @ a1.abs())
    bound = (RANK + 2 + 3) * 2**-24 * magnitude + torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((got.double() - expected).abs() <= bound).all()


def test_rounded_once(stored):
    """In reduced precision, all but ties moved by float32's own error are the nearest to the float32 result."""
    exact = whole(merged(stored), "w.weight", torch.float32)
    assert torch.equal(whole(merged(stored), "w.weight", torch.bfloat16), exact.to(torch.bfloat16))


def test_adapter_tensor_replaces_the_base_and_takes_the_lora(stored):
    _, lora = stored
    expected = lora["v.weight"].read().double() + lora["b0"].read().double() @ lora["a0"].read().double()
    got = whole(merged(stored), "v.weight", torch.float32).double()
    # As above; |W| + |B||A| is below 40 for these numbers.
    assert (got - expected).abs().max() <= (RANK + 1) * 2**-24 * 40


def test_biases_are_untouched(stored):
    base, _ = stored
    got = whole(merged(stored), "w.bias", torch.float32)
    assert torch.equal(got, base["w.bias"].read().float())


def test_base_file_is_not_changed(stored):
    base, _ = stored
    before = base["w.weight"].read().clone()
    whole(merged(stored), "w.weight", torch.float32)
    assert torch.equal(base["w.weight"].read(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["w.weight", "a0"])
def test_nan_and_inf(tmp_path, value, key):
    tensors = {"w.weight": torch.ones(4, 4), "a0": torch.ones(2, 4), "b0": torch.ones(4, 2)}
    tensors[key][1, 2] = value
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    index = TensorIndex.open(path, "base")
    weights = MergedWeights(index, {}, {"w": [LoraPair(index["a0"], index["b0"])]})
    with pytest.raises(SourceError) as error:
        whole(weights, "w.weight", torch.float32)
    assert str(error.value) == (
        f"{path}: tensor '{key}' holds 1 NaN or Inf values; the file is damaged or the training diverged"
    )


def test_large_finite_values_are_fine(tmp_path):
    """Their sum overflows float32, they do not."""
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.full((4, 4), 3e38)}, path)
    assert torch.isfinite(whole(PlainWeights(TensorIndex.open(path, "base")), "w", torch.bfloat16)).all()


def test_float16_overflow():
    assert torch.equal(cast(torch.tensor([65504.0]), torch.float16, "w"), torch.tensor([65504.0], dtype=torch.float16))
    with pytest.raises(SourceError) as error:
        cast(torch.tensor([1.0, -70000.0]), torch.float16, "w")
    assert str(error.value) == (
        "tensor 'w' has the value -70000, beyond float16's 65504; export with --dtype bfloat16 or float32"
    )


def test_float64_overflow():
    with pytest.raises(SourceError) as error:
        cast(torch.tensor([1e39], dtype=torch.float64), torch.float32, "w")
    assert str(error.value) == "tensor 'w' has the value 1e+39, beyond float32's 3.40282e+38; the file is damaged"
