"""FP8 bundles through the real TensorRT-RTX: what the parser makes of Q and DQ, and engines; no GPU is needed."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest

from arcflow_runtime import Bundle, cli
from tests.fp8 import linears, make_scales, quantize

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[tensorrt-rtx]'", exc_type=ImportError
)

DTYPES = {"bfloat16": trt.DataType.BF16, "float16": trt.DataType.HALF}
#: golden student, export options, policy, parts that are quantised.
CASES = {
    "flux-bfloat16": ("flux-tiny", {"dtype": "bfloat16"}, "flux-t5", ("backbone", "text_encoder_2")),
    "flux-float16": ("flux-tiny", {"dtype": "float16"}, "flux", ("backbone",)),
    "qwen-bfloat16": ("qwen-tiny", {"dtype": "bfloat16"}, "qwen-image", ("backbone",)),
    "qwen-float16": ("qwen-tiny", {"dtype": "float16"}, "qwen-image", ("backbone",)),
}
#: The quick one has two quantised parts, of which one is an encoder.
BY_TIME = [c if c == "flux-bfloat16" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]


@pytest.fixture(scope="module")
def made(bundles, command_run, tmp_path_factory):
    """A function case -> the quantised bundle, made on first use."""
    known = {}

    def get(case):
        if case not in known:
            name, options, policy, parts = CASES[case]
            root = command_run.bundle if case == "flux-bfloat16" else bundles(name, **options)
            scales = make_scales(Bundle.open(root), lambda *_: 4.0, parts)
            known[case] = quantize(root, tmp_path_factory.mktemp("fp8") / "b", scales, policy)
        return known[case]

    return get


def build(root, *arguments):
    out, err = io.StringIO(), io.StringIO()
    command = ["build", root, "--backend", "tensorrt-rtx", "--resolutions", "64", "--json", *arguments]
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main([str(a) for a in command])
    return code, json.loads(out.getvalue())["engines"] if code == 0 else err.getvalue()


def parse(path):
    """The network that the library reads from a graph, and what keeps it alive."""

    class Logger(trt.ILogger):
        def log(self, severity, message):
            pass

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert parser.num_errors == 0
    return network, (parser, builder, logger)


def inputs(layer):
    return [t for t in (layer.get_input(i) for i in range(layer.num_inputs)) if t is not None]


@pytest.mark.slow
@pytest.mark.parametrize("case", BY_TIME)
def test_the_network_has_q_and_dq_where_the_policy_says_and_nowhere_else(made, case):
    bundle = made(case)
    for part in CASES[case][3]:
        spec = bundle.manifest.parts[part]
        network, _alive = parse(bundle.path(spec.graph))
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        producer = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}

        def source(tensor, producer=producer):
            """What makes a tensor; the parser may put reshapes between a weight and its product."""
            layer = producer.get(tensor.name)
            while layer is not None and layer.type == trt.LayerType.SHUFFLE:
                layer = producer.get(layer.get_input(0).name)
            return layer

        chosen = set(spec.quantization.layers)
        shared = set()
        for layer in layers:
            made_by = [s for s in map(source, inputs(layer)) if s is not None]
            kinds = [s.type for s in made_by]
            if layer.type == trt.LayerType.MATRIX_MULTIPLY and layer.name in chosen:
                assert kinds == [trt.LayerType.DEQUANTIZE] * 2, layer.name
                activation, weight = made_by
                shared.add(activation.name)
                assert weight.name == f"{layer.name}.weight_dequantize"
                weight.__class__ = trt.IDequantizeLayer  # how the library's Python casts down
                assert weight.axis == 1 and weight.get_input(1).shape[0] == layer.get_output(0).shape[-1]
                quantize_layer = source(activation.get_input(0))
                assert quantize_layer.type == trt.LayerType.QUANTIZE
                assert quantize_layer.get_output(0).dtype == trt.DataType.FP8
                assert weight.get_input(0).dtype == trt.DataType.FP8
                assert layer.get_output(0).dtype == DTYPES[spec.precision]
            elif layer.type not in (trt.LayerType.DEQUANTIZE, trt.LayerType.SHUFFLE):
                assert trt.LayerType.DEQUANTIZE not in kinds and trt.LayerType.QUANTIZE not in kinds, layer.name
        names = {layer.name for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY}
        assert set(linears(bundle, part)) <= chosen | names
        assert chosen <= names
        types = [layer.type for layer in layers]
        assert types.count(trt.LayerType.QUANTIZE) == len(shared)
        assert types.count(trt.LayerType.DEQUANTIZE) == len(shared) + len(chosen)


@pytest.mark.parametrize("case", BY_TIME)
def test_engines_are_built(made, case):
    bundle = made(case)
    code, rows = build(bundle.root, "--target", "sm89", "--parts", ",".join(CASES[case][3]))
    assert code == 0, rows
    assert [(row["part"], row["target"], row["reused"]) for row in rows] == [(p, "sm89", False) for p in CASES[case][3]]


@pytest.mark.parametrize("target", ["sm80", "sm86"])
def test_targets_without_fp8_are_refused_before_building(made, target):
    root = made("flux-bfloat16").root
    before = set(os.listdir(root))
    code, err = build(root, "--target", target, "--parts", "backbone")
    assert code == 1 and set(os.listdir(root)) == before
    assert f"backbone is in FP8, which {target} does not support; build for sm89 or newer, or build the" in err
