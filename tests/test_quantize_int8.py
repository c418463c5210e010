"""int8: codes and scales against ONNX Runtime's own quantiser, graphs against the formula in float64, and refusals."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization.quant_utils import QuantType, quantize_data
from safetensors.torch import load_file

from arcflow_export.errors import QuantizeError
from arcflow_export.formats.policy import load_policy, presets
from arcflow_export.graph.linears import find_linears
from arcflow_export.quantize.graph import QuantizeLinears
from arcflow_export.quantize.int8 import TINY, encode, make_scale
from arcflow_export.quantize.quantize import plan_quantization, quantize_bundle
from arcflow_runtime import Bundle, Pipeline, cli
from arcflow_runtime.backends import open_backend
from arcflow_runtime.build.plan import _check_precision
from arcflow_runtime.engines.cpu import has_vnni
from arcflow_runtime.engines.onnxruntime import session_options
from arcflow_runtime.errors import EngineError
from tests.conftest import embed
from tests.cpp import ids_of
from tests.test_cpp import arguments
from tests.test_golden import arguments as python_arguments
from tests.test_golden import golden

STUDENTS = ["flux-tiny", pytest.param("qwen-tiny", marks=pytest.mark.slow)]
POLICIES = {"flux-tiny": "flux-int8", "qwen-tiny": "qwen-image-int8"}
EMBEDDINGS = {
    ("flux-tiny", "text_encoder"): "text_model.embeddings.token_embedding",
    ("flux-tiny", "text_encoder_2"): "shared",
    ("qwen-tiny", "text_encoder"): "model.embed_tokens",
}
PARTS = {
    "flux-tiny": ["text_encoder", "text_encoder_2", "conditioner", "backbone"],
    "qwen-tiny": ["text_encoder", "backbone"],
}


@pytest.fixture(scope="module")
def int8(bundles, tmp_path_factory):
    """A function golden student -> (its float32 bundle, the same in int8), made on first use. With dtype bfloat16, all
    but the linears is in bfloat16.
    """
    known = {}

    def get(name, dtype="float32"):
        if (name, dtype) not in known:
            options = {} if dtype == "float32" else {"dtype": dtype, "keep_float32": ("*",)}
            before = Bundle.open(bundles(name, opset=23, steps=(2, 4), **options))
            plan = plan_quantization(before, None, load_policy(POLICIES[name]))
            after = Bundle.open(quantize_bundle(plan, tmp_path_factory.mktemp("int8") / "b", "test"))
            known[name, dtype] = before, after
        return known[name, dtype]

    return get


def test_weights_are_those_of_onnx_runtimes_quantizer():
    weight = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0, 1e-3])
    scale = make_scale(weight.abs().amax(0))
    codes = encode(weight, scale)
    for column in range(3):
        zero, wanted, theirs = quantize_data(weight[:, column].numpy(), QuantType.QInt8.tensor_type, symmetric=True)
        assert int(zero) == 0 and float(wanted) == scale[column].item()
        np.testing.assert_array_equal(codes[:, column].numpy(), theirs)


def test_scales_by_hand():
    """254 / 127 = 2; a channel of zeros has the scale 1; the smallest float32 must not give 0."""
    scale = make_scale(torch.tensor([254.0, 0.0, 1e-45]))
    assert scale.tolist() == [2.0, 1.0, TINY]
    assert encode(torch.tensor([[3.0, 0.0, 0.0], [-254.0, 0.0, 1e-45]]), scale).tolist() == [[2, 0, 0], [-127, 0, 0]]


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The linear "a" in int8, run by ONNX Runtime on `x`."""
    value = ir.Value(name="x", shape=ir.Shape(["rows", *x.shape[1:]]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = ir.Value(name="a.weight", shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT))
    stored.const_value = ir.tensor(weight, name="a.weight")
    node = ir.node("MatMul", [value, stored], name="a")
    node.outputs[0].name, node.outputs[0].type = "y", value.type
    node.outputs[0].shape = ir.Shape(["rows", *x.shape[1:-1], weight.shape[1]])
    graph = ir.Graph([value], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    assert find_linears(model).keys() == {"a"}
    QuantizeLinears({"a": "int8"})(model)
    assert [out.name for out in graph.outputs] == ["y"]
    scale = make_scale(torch.from_numpy(weight).abs().amax(0))
    graph.initializers["a.weight"].const_value = ir.tensor(encode(torch.from_numpy(weight), scale).numpy())
    graph.initializers["a.weight_scale"].const_value = ir.tensor(scale.numpy())
    # The runtime's options: without them, a CPU without VNNI saturates.
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def test_a_product_is_the_formula_of_b15():
    """Integers below 2^24 are exact in float32, so only the three float32 operations after the sum round: 3 x 2^-24."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 24)).astype(np.float32) * np.array([1, 1e-3, 1e4, 1, 1], np.float32)[:, None]
    x[0, 3] = 0
    weight = rng.standard_normal((24, 7)).astype(np.float32)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127), np.float32(TINY))
    codes = np.rint(x / scale)
    weight_scale = (np.abs(weight).max(0).astype(np.float64) / 127).astype(np.float32)
    exact = (codes.astype(np.float64) @ np.rint(weight / weight_scale)) * scale * weight_scale
    np.testing.assert_allclose(product(x, weight), exact, rtol=3 * 2**-24, atol=0)
    assert np.abs(codes).max() == 127 and (product(x, weight)[0, 3] == 0).all()


def test_a_token_does_not_depend_on_others():
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((3, 4, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
    alone = product(x[:1], weight)
    x[1:] *= 1000
    np.testing.assert_array_equal(product(x, weight)[:1], alone)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model name\t: x\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t: avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f\nbugs\t: avx_vnni\n", False),
        ("Features\t: asimd\n", False),
    ],
)
def test_a_cpu_that_does_not_saturate(text, found):
    assert has_vnni(text) == found


@pytest.mark.parametrize("name", STUDENTS)
def test_bundles(int8, name):
    before, after = int8(name)
    assert after.manifest.version == 3 and Bundle.open(after.root, "full").manifest == after.manifest
    assert [n for n, part in after.manifest.parts.items() if part.quantization is not None] == PARTS[name]
    for part in PARTS[name]:
        q = after.manifest.parts[part].quantization
        assert (q.format, q.scales, q.formats) == ("int8", None, None)
        old, new = (load_file(b.path(b.manifest.parts[part].weights)) for b in (before, after))
        narrow = {*q.layers, EMBEDDINGS.get((name, part))} - {None}
        for key, value in old.items():
            layer = key.removesuffix(".weight")
            if layer not in narrow or not key.endswith(".weight"):
                assert torch.equal(new[key], value), key
                continue
            assert new[key].dtype == torch.int8
            # Half a step, and the rounding of the quotient and of the scale to float32.
            step = new[f"{layer}.weight_scale"]
            assert step.shape == ((len(value), 1) if layer not in q.layers else value.shape[1:])
            assert ((new[key] * step - value).abs() <= step * (0.5 + 127 * 2**-23)).all(), key
        assert new.keys() == old.keys() | {f"{layer}.weight_scale" for layer in narrow}
        codes = {n.name for n in ir.load(after.path(after.manifest.parts[part].graph)).graph if "Integer" in n.op_type}
        assert codes == set(q.layers)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_decoder_is_stored_in_float16(int8, name):
    """Its arithmetic stays in float32, and weights are torch's own rounding."""
    before, after = int8(name)
    part = after.manifest.parts["vae_decoder"]
    assert part.quantization is None and part.precision == "float32"
    old, new = (load_file(b.path(part.weights)) for b in (before, after))
    assert new.keys() == old.keys()
    for key, value in old.items():
        stored = value.half() if key.endswith(".weight") and value.ndim > 1 else value
        assert new[key].dtype == stored.dtype and torch.equal(new[key], stored), key
    assert {v.dtype for v in new.values()} == {torch.float16, torch.float32}


@pytest.mark.parametrize("name", STUDENTS)
def test_both_engines_run_it(int8, name):
    """The bound is the threshold of the policies for latents."""
    pytest.importorskip("openvino")
    before, after = int8(name)

    def run(bundle, backend):
        pipe = Pipeline.load(bundle.root, backend=backend)
        return pipe("a red circle", 64, 48, seed=3, output_type="latents").images

    reference = run(before, "onnxruntime")
    for backend in ("onnxruntime", "openvino"):
        assert 0 < np.linalg.norm(run(after, backend) - reference) < 0.05 * np.linalg.norm(reference), backend


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_linears_in_int8_and_all_else_in_bfloat16(int8, name):
    """The bound is the threshold of the policies for latents, against the same bundle with its linears in float32.
    Attention must run in bfloat16, which is what it is for, and the products with stored int8 weights, whose layers
    OpenVINO calls FullyConnectedCompressed.
    """
    openvino = pytest.importorskip("openvino")
    before, after = int8(name, "bfloat16")
    assert {part.precision for part in after.manifest.parts.values()} == {"bfloat16"}
    wanted, got = (
        Pipeline.load(b.root, backend="openvino")("a red circle", 64, 48, seed=3, output_type="latents").images
        for b in (before, after)
    )
    assert 0 < np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)
    profiled = open_backend("openvino", threads=1).open_profiled(after, "backbone")
    sizes = {"batch": 1, "image_tokens": 12, "text_tokens": 8}
    spec = after.manifest.parts["backbone"]
    shapes = {s.name: ([sizes[d] if isinstance(d, str) else d for d in s.shape], s.dtype) for s in spec.inputs}
    profiled.run({n: np.zeros(shape, {"bfloat16": np.uint16}.get(d, d)) for n, (shape, d) in shapes.items()})
    layers = profiled.layer_times()
    compressed = [layer for layer in layers if layer.operator == "FullyConnectedCompressed f32"]
    assert len(compressed) == len(spec.quantization.layers)
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        attention = [layer.operator for layer in layers if "attention" in layer.layer]
        assert attention == ["Subgraph bf16"] * {"flux-tiny": 5, "qwen-tiny": 3}[name]
    message = (
        "text_encoder is in bfloat16, which ONNX Runtime cannot run on a CPU; export the bundle with --dtype float32"
    )
    with pytest.raises(EngineError, match=f"^{message}$"):
        open_backend("onnxruntime", threads=1).check(after)


def test_the_golden_case_in_c(int8, cpp_library):
    """The C++ library with OpenVINO, against the reference implementation; the bound is the policy's for latents."""
    case, reference = golden("flux-tiny", 0)
    steps: list[np.ndarray] = []
    _, after = int8("flux-tiny")
    pipe = embed.Pipeline(cpp_library, after.root)
    tokens = [ids_of(after.root, case["prompt"])]
    images = pipe.generate(tokens=tokens, **arguments(case), on_step=lambda _, x: steps.append(x))
    pipe.close()
    for i, x in enumerate(steps):
        wanted = reference[f"step{i}.latents"]
        difference = np.linalg.norm(x.reshape(images.latents.shape) - wanted)
        assert 0 < difference < 0.05 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_c_computes_the_mixed_precision_as_python_does(int8, cpp_library):
    """The bound is a tenth of the threshold for latents: the two use the same kernels, and differ in the update."""
    case, _ = golden("flux-tiny", 0)
    _, after = int8("flux-tiny", "bfloat16")
    wanted = Pipeline.load(after.root, backend="openvino")(**python_arguments(case), output_type="latents").images
    pipe = embed.Pipeline(cpp_library, after.root)
    images = pipe.generate(tokens=[ids_of(after.root, case["prompt"])], **arguments(case))
    pipe.close()
    assert np.linalg.norm(images.latents - wanted) < 0.005 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_a_slot_reads_the_input_before_it_is_quantised(bundles, tmp_path):
    before = Bundle.open(bundles("flux-tiny", opset=23, steps=(2, 4), lora_slots=("*",)))
    plan = plan_quantization(before, None, load_policy("flux-int8"))
    after = Bundle.open(quantize_bundle(plan, tmp_path / "b", "test"))
    assert after.manifest.version == 3 and after.manifest.slots().keys() == before.manifest.slots().keys()
    part = after.manifest.parts["backbone"]
    nodes = {n.name: n for n in ir.load(after.path(part.graph)).graph}
    for layer in part.quantization.layers:
        scaled = nodes[layer].inputs[0].producer().inputs[0].producer()
        assert nodes[f"{layer}.lora_down"].inputs[0] is scaled.inputs[0], layer
        assert nodes[f"{layer}.lora_add"].inputs[0].producer() is nodes[f"{layer}.weight_rescale"], layer


def test_the_command(bundles, tmp_path, capsys):
    root = str(bundles("flux-tiny", opset=23, steps=(2, 4)))
    assert cli.main(["quantize", root, "--format", "int8", "--out", str(tmp_path / "a"), "--json", "--anyway"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "flux-int8"
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    assert re.search(r"backbone .*float32, 40 linears in int8 \(\d+\.\d% of the parameters\)", capsys.readouterr().out)
    code = cli.main(["quantize", root, "--format", "int8", "--policy", "flux", "--out", str(tmp_path / "b"), "--json",
                     "--anyway"])  # fmt: skip
    assert code == 0 and json.loads(capsys.readouterr().out)["policy"] == "flux"
    parts = Bundle.open(tmp_path / "b").manifest.parts
    assert {n: p.quantization.format for n, p in parts.items() if p.quantization} == {"backbone": "int8"}


def test_presets():
    assert {"flux-int8", "qwen-image-int8", "shapes-int8"} <= set(presets())
    assert load_policy("flux-int8").parts == load_policy("shapes-int8").parts


def test_scales_are_for_formats_that_are_calibrated(bundles):
    bundle = Bundle.open(bundles("flux-tiny", opset=23, steps=(2, 4)))
    message = "int8 measures its inputs while it runs and takes no scales; leave --scales out"
    with pytest.raises(QuantizeError, match=f"^{message}$"):
        plan_quantization(bundle, object(), load_policy("flux-int8"))
    with pytest.raises(
        QuantizeError, match=r"^FP8 needs scales; make them with `arcflow calibrate` and give --scales$"
    ):
        plan_quantization(bundle, None, load_policy("flux"))


def test_another_precision_is_refused(command_run):
    message = (
        "text_encoder: text_model.encoder.layers.0.self_attn.q_proj must compute in float32 for int8, got BFLOAT16; "
        "export the bundle with --dtype float32, or with --dtype bfloat16 --keep-float32 '*' for a CPU with bfloat16"
    )
    with pytest.raises(QuantizeError, match=f"^{re.escape(message)}$"):
        plan_quantization(Bundle.open(command_run.bundle), None, load_policy("shapes-int8"))


def test_gpus_refuse_it(int8):
    _, after = int8("flux-tiny")
    message = (
        "backbone is in int8, which is for CPUs; build the bundle that this one was quantised from, or quantise that "
        "to FP8"
    )
    with pytest.raises(EngineError, match=f"^{message}$"):
        _check_precision(after, "backbone", "sm89")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm89"], "--precision int8 is for CPUs, got --target sm89; leave --target out"),
        (
            ["--backend", "tensorrt-rtx", "--target", "sm89"],
            "--precision int8 is for CPUs, got --backend tensorrt-rtx; leave --backend and --target out, or give "
            "--precision fp8",
        ),
    ],
)
def test_compile_refuses_a_target(tmp_path, capsys, options, message):
    assert cli.main(["compile", "flux", "--precision", "int8", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
