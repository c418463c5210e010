"""Sums of memory: activations against graphs that run, stages by hand, the choice of the mode, `arcflow inspect`."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fake_bundle import FakeBackend, make_bundle
from onnx import TensorProto, helper
from records import read

from arcflow_runtime import Pipeline, cli
from arcflow_runtime.build.profiles import make_profiles, parse_sizes
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import ShapeRange
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.engines import host_memory
from arcflow_runtime.engines.modes import (
    MODES,
    ONNX_RUNTIME_CPU,
    ONNX_RUNTIME_CUDA,
    TENSORRT,
    EngineBytes,
    MemoryRules,
    keeps,
)
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from arcflow_runtime.maths.dtypes import NUMPY
from arcflow_runtime.memory.activations import PartGraph, _evaluate
from arcflow_runtime.memory.choice import choose_mode, fitting_mode, gigabytes
from arcflow_runtime.memory.sums import (
    BETWEEN,
    BundleMemory,
    ImageSize,
    PartBytes,
    PlanBytes,
    Sums,
    make_sums,
    part_inputs,
)

SCRATCH = TENSORRT.scratch_bytes
SIZE = ImageSize(2, 32, 48, 16, 2)


def graph(nodes, inputs, outputs, values=(), weights=()):
    """A parsed graph; values are (name, shape) in float32, or (name, shape, type)."""

    def info(name, shape, dtype=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, dtype, shape)

    made = helper.make_graph(
        [helper.make_node(op, given, made, **attributes) for op, given, made, attributes in nodes],
        "g",
        [info(*v) for v in inputs],
        [info(*v) for v in outputs],
        [TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape) for name, shape in weights],
        value_info=[info(*v) for v in values],
    )
    return PartGraph.parse(helper.make_model(made).SerializeToString())


def test_an_nvfp4_weight_is_no_activation_and_a_cast_of_one_is_none():
    """10 rows: numbers and float32 values of the input, 16 bytes and 64 a row, both bfloat16 results, 32 and 16."""
    nodes = [
        ("DequantizeLinear", ["w", "s"], ["wide"], {}),
        ("Cast", ["wide"], ["weight"], {"to": TensorProto.BFLOAT16}),
        ("TRT_FP4DynamicQuantize", ["x", "t"], ["q", "b"], {}),
        ("DequantizeLinear", ["q", "b"], ["values"], {}),
        ("Cast", ["values"], ["cast"], {"to": TensorProto.BFLOAT16}),
        ("MatMul", ["cast", "weight"], ["y"], {}),
        ("Relu", ["y"], ["z"], {}),
    ]
    made = graph(
        nodes,
        [("x", ["B", 16], TensorProto.BFLOAT16)],
        [("z", ["B", 8], TensorProto.BFLOAT16)],
        [
            ("wide", [16, 8]),
            ("weight", [16, 8], TensorProto.BFLOAT16),
            ("q", ["B", 16], TensorProto.FLOAT4E2M1),
            ("b", ["B", 1], TensorProto.FLOAT8E4M3FN),
            ("values", ["B", 16]),
            ("cast", ["B", 16], TensorProto.BFLOAT16),
            ("y", ["B", 8], TensorProto.BFLOAT16),
        ],
        [("w", (16, 8)), ("s", (1, 8)), ("t", ())],
    )
    assert {"wide", "weight"} <= made.weights and not made.weights & {"values", "cast", "y"}
    # The cast runs beside its source; the product is counted once more, as for every product with weights.
    assert made.activation_bytes({"x": (10, 16)}, TENSORRT) == SCRATCH + 10 * (64 + 32) + 10 * 16


def test_a_result_is_kept_until_its_last_use():
    """With 10 rows, a has 80 floats, its view b none of its own, c 40, d 120. The caller has inputs and outputs."""
    chain = [
        ("MatMul", ["x", "w"], ["a"], {}),
        ("Reshape", ["a", "s"], ["b"], {}),
        ("MatMul", ["x", "v"], ["c"], {}),
        ("Concat", ["b", "c"], ["d"], {"axis": 1}),
        ("Relu", ["c"], ["e"], {}),
        ("Add", ["d", "d"], ["y"], {}),
        ("Add", ["e", "e"], ["z"], {}),
    ]
    values = [("a", ["n", 8]), ("b", ["n", 8]), ("c", ["n", 4]), ("d", ["n", 12]), ("e", ["n", 4])]
    made = graph(
        chain,
        [("x", ["n", 3])],
        [("y", ["n", 12]), ("z", ["n", 4])],
        values,
        [("w", [3, 8]), ("v", [3, 4]), ("s", [2])],
    )
    # At Concat: a (by its view), c and d.
    assert made.activation_bytes({"x": (10, 3)}, ONNX_RUNTIME_CUDA) == 4 * (80 + 40 + 120)
    assert made.activation_bytes({"x": (1, 3)}, ONNX_RUNTIME_CUDA) == 4 * (8 + 4 + 12)
    # a and c are one product of x, so that both are there at Relu, with d and e. The larger product counts twice.
    assert made.activation_bytes({"x": (10, 3)}, TENSORRT) == SCRATCH + 4 * (80 + 40 + 120 + 40 + 80)


def test_attention_and_float16_by_the_library():
    """Heads 2, T 5, S 7, head size 8: scores have 2 * 5 * 7 numbers, before and after the softmax."""
    shapes = {"q": (1, 2, 5, 8), "k": (1, 2, 7, 8), "v": (1, 2, 7, 8)}
    half = TensorProto.FLOAT16
    made = graph(
        [("Attention", ["q", "k", "v"], ["a"], {}), ("Relu", ["a"], ["y"], {})],
        [(n, ["B", *s[1:]], half) for n, s in shapes.items()],
        [("y", ["B", 2, 5, 8], half)],
        [("a", ["B", 2, 5, 8], half)],
    )
    out, scores = 2 * 5 * 8, 2 * 2 * 5 * 7
    assert made.activation_bytes(shapes, TENSORRT) == SCRATCH + 2 * out
    assert made.activation_bytes(shapes, ONNX_RUNTIME_CUDA) == 2 * (out + scores)
    assert made.activation_bytes(shapes, ONNX_RUNTIME_CPU) == 4 * (out + scores)


def test_a_dequantised_weight_is_an_activation_where_it_is_not_fused():
    made = graph(
        [("DequantizeLinear", ["w", "s"], ["d"], {}), ("MatMul", ["x", "d"], ["a"], {}), ("Relu", ["a"], ["y"], {})],
        [("x", ["n", 3])],
        [("y", ["n", 4])],
        [("d", [3, 4]), ("a", ["n", 4])],
        [("w", [3, 4]), ("s", [])],
    )
    assert made.activation_bytes({"x": (10, 3)}, TENSORRT) == SCRATCH + 2 * 4 * 40
    assert made.activation_bytes({"x": (10, 3)}, ONNX_RUNTIME_CUDA) == 4 * (40 + 12)


def test_what_a_graph_does_not_say_is_unknown():
    relu = ("Relu", ["x"], ["a"], {}), ("Relu", ["a"], ["y"], {})
    tensors = [("x", ["n"])], [("y", ["n"])]
    assert graph(relu, *tensors, [("a", ["n"])]).activation_bytes({"x": (3,)}, TENSORRT) == SCRATCH + 12
    for values in ([], [("a", [None])], [("a", ["n/2"])], [("a", ["m"])]):
        assert graph(relu, *tensors, values).activation_bytes({"x": (3,)}, TENSORRT) is None
    assert graph(relu, *tensors, [("a", ["n"])]).activation_bytes({"other": (3,)}, TENSORRT) is None
    assert graph(relu, *tensors, [("a", [1 << 40, 1 << 40])]).activation_bytes({"x": (3,)}, TENSORRT) is None
    for op in ("MatMul", "Attention", "DequantizeLinear", "Reshape"):
        for given in ([], ["x"]):
            odd = graph([(op, given, ["a"], {}), relu[1]], *tensors, [("a", ["n"])])
            assert odd.activation_bytes({"x": (3,)}, ONNX_RUNTIME_CUDA) in (None, 0, 12)
            assert odd.activation_bytes({"x": (3,)}, TENSORRT) - SCRATCH in (0, 12, 24)
    inner = helper.make_graph([], "inner", [], [])
    assert graph([("If", ["x"], ["y"], {"then_branch": inner, "else_branch": inner})], *tensors) is None


def test_dimensions():
    sizes = (("a", 3), ("b", 5))
    for text, value in (("a", 3), ("a + b", 8), ("4*a*b", 60), ("(b - a)*2", 4), ("b // 2", 2), ("b % 3", 2), ("7", 7)):
        assert _evaluate(text, sizes) == value
    for text in ("", "c", "a**b", "a.b", "f(a)", "b/2", "a // 0", "-a", "1 + " * 60 + "1", "'a'", "True"):
        assert _evaluate(text, sizes) is None


@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_the_bound_is_that_of_the_shapes_that_a_run_has(name, bundles, tmp_path):
    """Every intermediate result of a real run is asked for, and the largest set of live ones is found by trying all."""
    bundle = Bundle.open(bundles(name))
    for part, inputs in part_inputs(bundle.manifest, SIZE).items():
        spec = bundle.manifest.parts[part]
        model = onnx.load(bundle.path(spec.graph), load_external_data=False)
        outside = {v.name for v in (*model.graph.input, *model.graph.output)} | {
            t.name for t in model.graph.initializer
        }
        constant = {t.name for t in model.graph.initializer}
        views, spans = {}, {}
        for i, node in enumerate(model.graph.node):
            if all(given in constant for given in node.input):
                constant |= {*node.output}
                continue
            for given in filter(None, node.input):
                if views.get(given, given) in spans:
                    spans[views.get(given, given)][1] = i
            for made in node.output:
                if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"):
                    views[made] = views.get(node.input[0], node.input[0])
                    if made in outside and views[made] in spans:
                        spans[views[made]][1] = i
                elif made not in outside:
                    spans[made] = [i, i]
        known = {v.name: v for v in model.graph.value_info}
        asked = {n for node in model.graph.node if node.op_type == "Attention" for n in node.input[:2]}
        asked = [*dict.fromkeys([*spans, *sorted(asked)])]
        model.graph.output.extend(known[n] for n in asked)
        graph_path = tmp_path / spec.graph
        onnx.save(model, graph_path)
        if not (tmp_path / spec.weights).exists():
            shutil.copyfile(bundle.path(spec.weights), tmp_path / spec.weights)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
        feeds = {s.name: np.ones(inputs[s.name], NUMPY[s.dtype]) for s in spec.inputs}
        found = dict(zip(asked, session.run(asked, feeds), strict=True))
        expected = max(
            sum(found[n].nbytes for n, (start, end) in spans.items() if start <= i <= end) + scores(node, found)
            for i, node in enumerate(model.graph.node)
        )
        assert PartGraph.read(bundle, part).activation_bytes(inputs, ONNX_RUNTIME_CUDA) == expected, part
        assert PartGraph.read(bundle, part).activation_bytes(inputs, TENSORRT) > SCRATCH


def scores(node, found):
    """Bytes of an attention's scores, before and after the softmax."""
    if node.op_type != "Attention":
        return 0
    q, k = (found[name] for name in node.input[:2])
    return 2 * q.itemsize * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def flux_sums(rules=TENSORRT):
    """Sums with numbers that are told apart by their digits."""
    parts = {
        "text_encoder": PartBytes(1_000, 5, 1),
        "text_encoder_2": PartBytes(50_000, 20, 2),
        "conditioner": PartBytes(30_000, 7, 3),
        "backbone": PartBytes(200_000, 300, 999),
        "vae_decoder": PartBytes(4_000, 700, 999),
    }
    encoders = ("text_encoder", "text_encoder_2")
    last = ("backbone", "vae_decoder")
    plans = {mode: PlanBytes(1_000_000, 2_000_000) for mode in MODES}
    runs = dict.fromkeys(MODES, (*encoders, "conditioner", *last))
    by_host = {"resident": encoders, "balanced": (*encoders, "conditioner"), "low": (*encoders, "conditioner")}
    return Sums(SIZE, rules, parts, plans, runs, by_host)


def test_stages_by_hand():
    sums, plan = flux_sums(), 3_000_000
    everything = plan + 285_000 + 700 + 3
    assert set(sums.stages("resident").values()) == {everything}
    held = plan + 204_000 + 700 + 6
    assert sums.stages("balanced") == {
        "text_encoder": held + 1_000,
        "text_encoder_2": held + 50_000,
        "conditioner": held + 30_000,
        "backbone": held,
        "vae_decoder": held,
        BETWEEN: held,
    }
    assert sums.stages("low") == {
        "text_encoder": plan + 1_000 + 5 + 1,
        "text_encoder_2": plan + 50_000 + 20 + 2,
        "conditioner": plan + 30_000 + 7 + 3,
        "backbone": plan + 200_000 + 300,
        "vae_decoder": plan + 4_000 + 700,
        BETWEEN: plan,
    }
    assert [sums.peak(mode) for mode in MODES] == [everything, held + 50_000, plan + 200_300]


def test_stages_of_a_library_without_a_common_workspace():
    sums, plan = flux_sums(ONNX_RUNTIME_CPU), 3_000_000
    assert sums.peak("resident") == plan + 285_000 + 1_032 + 3
    assert sums.peak("balanced") == plan + 204_000 + 1_000 + 6 + 50_020
    assert sums.peak("low") == plan + 200_300


def test_the_first_mode_that_fits():
    sums = flux_sums()
    for mode in MODES:
        peak = sums.peak(mode)
        assert fitting_mode(sums, peak) == mode
        assert fitting_mode(sums, peak - 1) != mode
    assert choose_mode(sums, sums.peak("resident")) == ("resident", None)
    assert choose_mode(sums, sums.peak("balanced")) == (
        "balanced",
        "memory='balanced': an image of 32 x 48 px needs up to 0.003 GB with 'resident', 0.003 GB with 'balanced', "
        "and 0.003 GB of the GPU's memory are free",
    )
    mode, text = choose_mode(sums, 0)
    assert mode == "low"
    assert text.endswith("are free; generate smaller images, or use a bundle in FP8 (arcflow quantize)")
    assert [gigabytes(n) for n in (24_000_000, 99_999_999, 123_456_789, 33_700_000_000)] == [
        "0.024",
        "0.100",
        "0.1",
        "33.7",
    ]


@pytest.mark.slow
def test_float16_is_widened_on_a_cpu(bundles):
    bundle = Bundle.open(bundles("flux-tiny", dtype="float16"))
    gpu, cpu = (BundleMemory(bundle, rules).sums(SIZE).parts["backbone"] for rules in (TENSORRT, ONNX_RUNTIME_CPU))
    part = bundle.manifest.parts["backbone"]
    assert gpu.weights == bundle.manifest.files[part.weights].bytes
    assert cpu.weights == gpu.weights + 4 * part.parameters


def test_engines_take_the_place_of_files_and_bounds(bundles):
    bundle = Bundle.open(bundles("flux-tiny"))
    plain = BundleMemory(bundle, TENSORRT).sums(SIZE).parts
    profiles = make_profiles(bundle.manifest, "backbone", parse_sizes("512,16-64"), SizeRange(1, 2))
    engine = EngineBytes(77, tuple(zip(profiles, (99, 88), strict=True)))
    memory = BundleMemory(bundle, TENSORRT, {"backbone": engine})
    for size, activations in ((SIZE, 88), (dataclasses.replace(SIZE, height_px=512, width_px=512), 99)):
        built = memory.sums(size).parts
        assert (built["backbone"].weights, built["backbone"].activations) == (77, activations)
    built = memory.sums(SIZE).parts
    assert {**plain, "backbone": None} == {**built, "backbone": None}
    too_large = dataclasses.replace(SIZE, batch=3)
    bound = BundleMemory(bundle, TENSORRT).sums(too_large).parts["backbone"].activations
    assert memory.sums(too_large).parts["backbone"].activations == bound


def test_nothing_but_the_manifest_and_graphs_is_read(bundles, tmp_path):
    """The sums of a bundle whose weights are gone, in a process that may not import numpy."""
    bundle = Bundle.open(bundles("flux-tiny"))
    for name in bundle.manifest.files:
        if name.endswith(".onnx"):
            shutil.copyfile(bundle.path(name), tmp_path / name)
        elif name.endswith(".safetensors"):
            with (tmp_path / name).open("wb") as f:
                f.truncate(bundle.manifest.files[name].bytes)
    (tmp_path / "manifest.json").write_text((bundle.root / "manifest.json").read_text())
    code = """
import sys
sys.modules["numpy"] = None
from pathlib import Path
from arcflow_runtime.disk.bundle import Bundle, read_manifest
from arcflow_runtime.engines.modes import TENSORRT
from arcflow_runtime.memory.choice import choose_mode
from arcflow_runtime.memory.sums import BundleMemory, ImageSize
root = Path(sys.argv[1])
sums = BundleMemory(Bundle(root, read_manifest(root)[0]), TENSORRT).sums(ImageSize(2, 32, 48, 16, 2))
print(choose_mode(sums, 0)[0], [sums.peak(mode) for mode in ("resident", "balanced", "low")])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    sums = BundleMemory(bundle, TENSORRT).sums(SIZE)
    assert done.stdout == f"low {[sums.peak(mode) for mode in MODES]}\n", done.stderr


class Measured(FakeBackend):
    """A `FakeBackend` that knows its memory; the graphs of its bundles cannot be read, so its engines have bounds."""

    memory_rules = MemoryRules("CPU", one_workspace=False, fused=False)

    def __init__(self, free):
        super().__init__()
        self.free = free

    def free_bytes(self):
        return self.free

    def built_bytes(self, bundle, part):
        inputs = part_inputs(bundle.manifest, ImageSize(1, 256, 128, 64, 2))[part]
        profile = {name: ShapeRange(shape, shape, shape) for name, shape in inputs.items()}
        return EngineBytes(1_000_000, ((profile, 1_000_000),))


def test_a_pipeline_chooses_its_mode_by_the_free_memory(tmp_path, caplog):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    for free, mode in ((1 << 40, "resident"), (None, "resident"), (9_000_000, "balanced"), (1_000, "low")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "arcflow"), Pipeline(bundle, Measured(free)) as pipe:
            assert pipe.memory == mode
        said = [r.message for r in caplog.records]
        assert len(said) == (mode != "resident")
        assert all(s.startswith(f"memory={mode!r}: an image of 256 x 128 px needs up to ") for s in said)
        assert all("GB of the CPU's memory are free" in s for s in said)
    caplog.clear()
    with Pipeline(bundle, Measured(1_000), "resident") as pipe:
        assert (pipe.memory, caplog.text) == ("resident", "")


def test_free_memory_of_this_machine(tmp_path, monkeypatch):
    if sys.platform == "linux":
        assert 0 < OnnxRuntimeBackend(None).free_bytes() < 1 << 50
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert host_memory.available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2000 kB\n")
    assert host_memory.available_bytes() == 2000 << 10
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 20000\nactive_file 3000\n")
    for limit, free in (("max", 2000 << 10), ("1000000", 323_000), ("10000000000", 2000 << 10), ("5", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        expected = max(free, 0) if limit != "5" else 0
        assert host_memory.available_bytes() == expected


def test_keeps():
    parts = ("text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder")
    assert [sum(keeps(mode, part) for part in parts) for mode in MODES] == [5, 2, 0]


def test_inspect(bundles, capsys):
    root = str(bundles("flux-tiny"))
    sums = BundleMemory(Bundle.open(root), TENSORRT)
    assert cli.main(["inspect", root, "--gpu-memory", "16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["gpu_memory"]
    assert [(i["batch"], i["height_px"]) for i in shown["images"]] == [
        (batch, px) for batch in (1, 4) for px in (512, 768, 1024, 1536, 2048)
    ]
    for image in shown["images"]:
        size = ImageSize(**{f.name: image[f.name] for f in dataclasses.fields(ImageSize)})
        expected = sums.sums(size)
        assert {mode: found["peak_bytes"] for mode, found in image["modes"].items()} == {
            mode: expected.peak(mode) for mode in MODES
        }
        assert image["fits"] == fitting_mode(expected, 16 * 10**9)
    assert cli.main(["inspect", root, "--gpu-memory", "16"]) == 0
    assert "\nmemory on a GPU with 16.0 GB, texts of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gigabytes", "advice"),
    [
        ("0.0001", "nothing fits: vae_decoder alone needs 0.1 GB for 512 px, 0.000 GB of it weights\ngenerate smaller"),
        ("0.5", "the largest that fits is 512 px, 1 at once; build engines for it with arcflow build --resolutions"),
    ],
)
def test_inspect_says_what_to_do(gigabytes, advice, bundles, capsys):
    assert cli.main(["inspect", str(bundles("flux-tiny")), "--gpu-memory", gigabytes]) == 0
    assert f"\n{advice}" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["0", "-1", "x", "nan", "inf"])
def test_inspect_wants_a_size(wrong, bundles, capsys):
    assert cli.main(["inspect", str(bundles("flux-tiny")), f"--gpu-memory={wrong}"]) == 2
    assert f"must be a number of GB such as 16, got '{wrong}'" in capsys.readouterr().err


def test_the_former_option_of_the_command(capsys):
    assert cli.main(["generate", "bundle", "x", "--low-memory"]) == 2
    assert "unknown argument '--low-memory'; did you mean --memory?" in capsys.readouterr().err


def test_the_real_sizes_are_those_of_full_size_exports():
    """The weights that docs/memory.md has, against what was written: bundles differ by graphs and tokenizers, 30 MB."""
    for model in ("flux", "qwen"):
        weights = read("memory")["models"][model]["weights"]["bf16"]
        written = read(f"export_{model}")["bundle_bytes"]
        assert 0 < written - sum(weights.values()) < 30e6
    coverage = read("quantize_flux")["coverage"]
    flux = read("memory")["models"]["flux"]["weights"]
    # The graph and the header of the weights file are counted there.
    assert 0 < coverage["bytes_before"] - flux["bf16"]["backbone"] < 3e6
    assert 0 < coverage["bytes_after"] - flux["FP8 backbone"]["backbone"] < 3e6


def test_the_bounds_hold_for_engines_of_the_real_shapes():
    """What TensorRT-RTX's builder says that its engines need (docs/engines.md), against docs/memory.md."""
    bounds = read("memory")["models"]["flux"]["activations"]
    built = read("engine_memory")
    whole = [r for r in built["decoder"] if r["query_groups"] == 1]
    decoders = {r["size"]: max(r["activation_bytes"]) for r in whole if r["size"] in bounds}
    assert decoders.keys() == bounds.keys()
    for size, needed in decoders.items():
        assert bounds[size]["vae_decoder"] / 3 < needed <= bounds[size]["vae_decoder"]


def test_make_sums_takes_the_numbers_that_it_is_given(bundles):
    m = Bundle.open(bundles("qwen-tiny")).manifest
    sums = make_sums(m, SIZE, TENSORRT, dict.fromkeys(m.parts, 10), dict.fromkeys(m.parts))
    assert not sums.complete
    assert sums.runs["resident"] == ("text_encoder", "backbone", "vae_decoder")  # the modulation is in a table
    assert all(part.weights == 10 for part in sums.parts.values())
