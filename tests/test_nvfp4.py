"""NVFP4: numbers and scales beside two independent sources, the emulation on a CPU, policies and what is refused."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

from arcflow_export.emulate.nvfp4 import lower_nvfp4
from arcflow_export.errors import QuantizeError
from arcflow_export.formats.policy import load_policy
from arcflow_export.graph.linears import LinearNode, find_linears
from arcflow_export.quantize import nvfp4
from arcflow_export.quantize.graph import QuantizeLinears
from arcflow_export.quantize.quantize import plan_quantization
from arcflow_runtime import Bundle, Pipeline
from arcflow_runtime.errors import EngineError
from tests.fp8 import make_scales, quantize, write_policy

F4, F8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
EVERY = ("transformer_blocks.*", "single_transformer_blocks.*")


def reference(x: np.ndarray, tensor_scale: np.float32, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Block scales [..., n / 16] and numbers [..., n] in float32, rounded by ml_dtypes; blocks are on the last axis."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    ratio = np.abs(blocks).max(-1) / (np.float32(6) * tensor_scale)
    if least:
        ratio = np.where(ratio == 0, np.float32(1), ratio).clip(least)
    scales = ratio.clip(None, 448).astype(F8).astype(np.float32)
    divisor = np.maximum(scales * tensor_scale, np.finfo(np.float32).tiny)[..., None]
    return scales, (blocks / divisor).clip(-6, 6).astype(F4).astype(np.float32).reshape(x.shape)


def weights(seed: int, shape: tuple[int, int] = (64, 96), spread: float = 3.0) -> torch.Tensor:
    """Weights over many binades, with a block of zeros and blocks so small that their scale is the smallest."""
    random = np.random.default_rng(seed)
    w = random.standard_normal(shape) * np.exp(spread * random.standard_normal(shape))
    w[:16, 3] = 0
    w[16:32] *= 1e-9
    return torch.from_numpy(w.astype(np.float32))


def unpacked(numbers: torch.Tensor) -> np.ndarray:
    """The codes of E2M1 numbers, one in a byte."""
    packed = numbers.view(torch.uint8).numpy()
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def quantized(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = nvfp4.make_tensor_scale(w.abs().max())
    blocks = nvfp4.make_block_scales(w, scale)
    return nvfp4.encode(w, blocks, scale), blocks, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_as_ml_dtypes_rounds_them(dtype):
    w = weights(0, spread=1.0).to(dtype)
    numbers, blocks, scale = quantized(w)
    assert scale.item() == np.float32(w.abs().max().item()) / np.float32(6 * 448)
    scales, expected = reference(np.ascontiguousarray(w.float().numpy().T), scale.numpy(), 2**-9)
    assert np.array_equal(blocks.float().numpy(), scales.T)
    assert np.array_equal(unpacked(numbers).astype(np.uint8).view(F4).astype(np.float32), expected.T)


def test_ties_go_to_even_and_large_values_to_six():
    """Midpoints of neighbouring E2M1 numbers become the even one; values above 6, from too small a scale, become 6."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -5.0, -7.0, 0.0, 0.2501, 0.7499, 5.001]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0.0, -1.0, -4.0, -6.0, 0.0, 0.5, 0.5, 6.0]
    w = torch.tensor([ties, ties]).T
    one = torch.ones(1, 2).to(torch.float8_e4m3fn)
    codes = unpacked(nvfp4.encode(w, one, torch.tensor(1.0))).astype(np.uint8).view(F4).astype(np.float32)
    assert codes[:, 0].tolist() == codes[:, 1].tolist() == even


@pytest.mark.slow
def test_numbers_and_scales_are_those_of_modelopt():
    """Bit for bit, with the classes that its ONNX exporter uses."""
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="needs arcflow[calibrate]")
    for seed in range(3):
        w = weights(seed)
        numbers, blocks, scale = quantized(w)
        theirs, their_blocks, their_scale = qtensor.NVFP4QTensor.quantize(w.T.contiguous(), 16)
        assert scale.item() == their_scale.item()
        assert torch.equal(blocks.view(torch.uint8).T, their_blocks.view(torch.uint8))
        # modelopt packs neighbouring inputs; here neighbouring outputs share a byte.
        packed = theirs._quantized_data.numpy()
        assert np.array_equal(unpacked(numbers).T, np.stack([packed & 15, packed >> 4], -1).reshape(w.T.shape))


@pytest.mark.slow
def test_numbers_and_scales_are_those_of_modelopt_s_onnx_exporter():
    """Bit for bit. The exporter needs more packages than arcflow installs: nvidia-modelopt[onnx]."""
    needs = "needs nvidia-modelopt[onnx]"
    exporter = pytest.importorskip("modelopt.onnx.export.nvfp4_exporter", reason=needs, exc_type=ImportError)
    from modelopt.onnx.quantization import quant_utils

    for seed in range(3):
        w = weights(seed)
        numbers, blocks, scale = quantized(w)
        rows = np.ascontiguousarray(w.numpy().T)
        their_scale = quant_utils.get_weights_scaling_factor_2(rows)
        wide, narrow = exporter._encode_nvfp4_block_scale(quant_utils.get_weights_scaling_factor(rows, 16, their_scale))
        packed = exporter._cast_fp4(quant_utils.quantize(rows, 16, wide, their_scale)).reshape(-1)
        assert scale.item() == their_scale
        assert np.array_equal(blocks.view(torch.uint8).numpy().T, narrow)
        assert np.array_equal(unpacked(numbers).T, np.stack([packed & 15, packed >> 4], -1).reshape(rows.shape))


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 64])
def test_blocks_of_any_size_give_the_same_numbers(rows):
    w = weights(1)
    linear = linear_model(w)[1]
    stored = nvfp4.tensors(linear, w.abs().amax(0), 4.0)
    # The source may use its memory again for the next block.
    memory = torch.empty(rows, w.shape[1])

    def blocks():
        for start in range(0, len(w), rows):
            block = memory[: len(w[start : start + rows])]
            yield block.copy_(w[start : start + rows])

    numbers, scales, _ = quantized(w)
    for tensor, expected in zip(stored, (numbers, scales), strict=False):
        found = torch.cat([block.view(torch.uint8).clone() for block in tensor.encode(blocks())])
        assert torch.equal(found, expected.view(torch.uint8))
        assert tensor.dtype == expected.dtype
    assert [t.name for t in stored] == ["a.weight", "a.weight_scale", "a.weight_scale_2", "a.input_scale"]
    assert stored[0].shape == (64, 96) and stored[1].shape == (4, 96)
    assert stored[3].value.item() == np.float32(4) / np.float32(6 * 448)


def linear_model(w: torch.Tensor, dtype=ir.DataType.FLOAT, leading=("B", "T")) -> tuple[ir.Model, LinearNode]:
    """A model with one linear, `a`: y = x W."""
    rows, columns = w.shape
    x = ir.Value(name="x", shape=ir.Shape([*leading, rows]), type=ir.TensorType(dtype))
    y = ir.Value(name="y", shape=ir.Shape([*leading, columns]), type=ir.TensorType(dtype))
    weight = ir.Value(name="a.weight", shape=ir.Shape(w.shape), type=ir.TensorType(dtype))
    node = ir.node("MatMul", [x, weight], outputs=[y], name="a")
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weight], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=11)
    return model, find_linears(model)["a"]


def run_quantized(w: torch.Tensor, x: np.ndarray, amax: float) -> np.ndarray:
    model, linear = linear_model(w, leading=("B", "T")[: x.ndim - 1])
    stored = nvfp4.tensors(linear, w.abs().amax(0), amax)
    QuantizeLinears({"a": "nvfp4"})(model)
    for tensor in stored:
        value = tensor.value if tensor.value is not None else next(tensor.encode(iter([w])))
        raw = value.view(torch.uint8).numpy() if value.element_size() == 1 else value.numpy()
        initializer = model.graph.initializers[tensor.name]
        shape = ir.Shape(tensor.shape)
        kind = ir.PackedTensor if initializer.dtype == ir.DataType.FLOAT4E2M1 else ir.Tensor
        raw = (
            raw.view(F8)
            if initializer.dtype == ir.DataType.FLOAT8E4M3FN
            else raw.reshape(-1)
            if kind is ir.PackedTensor
            else raw
        )
        initializer.const_value = kind(raw, dtype=initializer.dtype, shape=shape, name=tensor.name)
    lowered = ir.to_proto(lower_nvfp4(model)).SerializeToString()
    session = ort.InferenceSession(lowered, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
@pytest.mark.parametrize("amax", [3.0, 0.25])
def test_the_emulation_computes_what_the_numbers_say(shape, amax):
    """With float64 sums of the numbers of ml_dtypes; float32 sums of 64 products err by at most 64 half ulps of the
    sum of their sizes. The smaller range is exceeded, so that block scales and numbers saturate.
    """
    w = weights(2, spread=0.5)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    x[..., 0, :16] = 0
    x[..., 0, 16:32] *= 1e-9
    got = run_quantized(w, x, amax)
    tensor_scale = np.float32(amax) / np.float32(6 * 448)
    scales, numbers = reference(x, tensor_scale, 0)
    values = (numbers.reshape(*shape[:-1], -1, 16) * (scales * tensor_scale)[..., None]).reshape(shape)
    codes, blocks, scale = quantized(w)
    wide = (blocks.float() * scale).repeat_interleave(16, 0).numpy()
    weight = unpacked(codes).astype(np.uint8).view(F4).astype(np.float32) * wide
    expected = values.astype(np.float64) @ weight.astype(np.float64)
    bound = np.abs(values).astype(np.float64) @ np.abs(weight) * 64 * np.finfo(np.float32).eps / 2
    assert (np.abs(got - expected) <= bound).all()
    assert np.abs(got - expected).max() < 0.01 * np.abs(x @ w.numpy() - expected).max(), "rounding must show"


@pytest.fixture(scope="module")
def mixed(bundles, tmp_path_factory):
    """The golden FLUX student in bfloat16 with its attention in FP8 and its MLPs in NVFP4."""
    root = bundles("flux-tiny", dtype="bfloat16")
    policy = tmp_path_factory.mktemp("policy") / "mixed.toml"
    write_policy(policy, EVERY, formats={"fp8_e4m3": ["*.attn.*"]}, usual="nvfp4")
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    return Bundle.open(root), quantize(root, tmp_path_factory.mktemp("mixed") / "b", scales, str(policy))


def test_a_policy_has_several_formats_and_the_manifest_says_which(mixed):
    source, bundle = mixed
    q = bundle.manifest.parts["backbone"].quantization
    assert (bundle.manifest.version, q.format) == (3, "nvfp4")
    assert {name for name in q.layers if q.format_of(name) == "fp8_e4m3"} == {n for n in q.layers if ".attn." in n}
    assert {q.format_of(name) for name in q.layers if ".attn." not in name} == {"nvfp4"}
    layer = "transformer_blocks.0.ff.net.0.proj"
    with safe_open(source.path("backbone.safetensors"), "pt") as f:
        w = f.get_tensor(f"{layer}.weight")
    numbers, blocks, scale = quantized(w)
    with safe_open(bundle.path("backbone.safetensors"), "pt") as f:
        assert f.get_slice(f"{layer}.weight").get_shape() == list(w.shape)
        assert torch.equal(f.get_tensor(f"{layer}.weight").view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(f.get_tensor(f"{layer}.weight_scale").view(torch.uint8), blocks.view(torch.uint8))
        assert f.get_tensor(f"{layer}.weight_scale_2").item() == scale.item()
        assert f.get_tensor("transformer_blocks.0.attn.to_q.weight").dtype == torch.float8_e4m3fn


def test_what_cannot_run_it_says_so(mixed):
    with pytest.raises(EngineError, match="backbone is quantised to NVFP4, which runs on Blackwell GPUs only, with"):
        Pipeline.load(mixed[1].root, backend="openvino")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": {"fp8_e4m3": ["*.atn.*"]}}, r"parts.backbone.formats.fp8_e4m3: '\*.atn.\*' matches none of the"),
        (
            {"formats": {"fp8_e4m3": ["*.attn.*"], "nvfp4": ["*.attn.to_q"]}},
            r"formats: 'transformer_blocks.0.attn.to_q' must match one format, got \['fp8_e4m3', 'nvfp4'\]",
        ),
        ({"formats": {"fp4": ["*.attn.*"]}}, r"parts.backbone: formats must be among .*, got \['fp4'\]"),
    ],
)
def test_wrong_formats_of_a_policy(mixed, tmp_path, changes, message):
    policy = write_policy(tmp_path / "p.toml", EVERY, usual="nvfp4", **changes)
    scales = make_scales(mixed[0], lambda *_: 4.0)
    with pytest.raises(QuantizeError, match=message):
        quantize(mixed[0].root, tmp_path / "out", scales, policy)


def test_sizes_and_opsets_that_it_cannot_have(mixed, tmp_path):
    source, _ = mixed
    older = dataclasses.replace(source, manifest=dataclasses.replace(source.manifest, opset=20))
    policy = load_policy(write_policy(tmp_path / "p.toml", EVERY, usual="nvfp4"))
    with pytest.raises(QuantizeError, match="NVFP4 needs opset 23, the bundle has 20; export with --opset 23"):
        plan_quantization(older, make_scales(source, lambda *_: 4.0), policy)
    _, linear = linear_model(torch.zeros(24, 8))
    assert nvfp4.refuse(linear).startswith("must have a multiple of 16 inputs and an even number of outputs for NVFP4")
    assert nvfp4.refuse(linear_model(torch.zeros(32, 8))[1]) is None
