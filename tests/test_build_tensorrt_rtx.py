"""The real TensorRT-RTX builder on the golden students; it needs no GPU. Nothing here runs an engine."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import onnx
import pytest
from attention_graph import attention_bundle, attention_profile
from fake_bundle import edit_manifest, list_files, make_bundle
from product_graph import product_bundle, product_profile

from arcflow_runtime import Bundle, cli
from arcflow_runtime.build.build import BuildSettings, _Build, build_engine
from arcflow_runtime.build.profiles import make_profiles, parse_sizes
from arcflow_runtime.build.static_axes import fix_static_axes
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.engines.modes import TENSORRT
from arcflow_runtime.engines.store import Host, engine_bytes, find_engine, read_records
from arcflow_runtime.engines.tensorrt_library import LIBRARIES, this_platform
from arcflow_runtime.errors import EngineError
from arcflow_runtime.memory.activations import PartGraph

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[tensorrt-rtx]'", exc_type=ImportError
)

FLUX = ["text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder"]
QWEN = ["text_encoder", "backbone", "vae_decoder"]
HEAVY = ["backbone", "vae_decoder"]
CASES = {
    "flux-bfloat16": ("flux-tiny", {"dtype": "bfloat16"}, FLUX),
    "qwen-bfloat16": ("qwen-tiny", {"dtype": "bfloat16"}, QWEN),
    "flux-float16": ("flux-tiny", {"dtype": "float16"}, HEAVY),
    # Backbone and T5 in bfloat16, the decoder in float16.
    "flux-mixed": ("flux-tiny", {"dtype": "bfloat16", "precision": (("vae_decoder", "float16"),)}, FLUX),
    # Linears in float32 among float16 ones.
    "flux-kept": (
        "flux-tiny",
        {"dtype": "float16", "keep_float32": ("transformer_blocks.*.ff.net.2", "proj_out_means")},
        ["text_encoder_2", "backbone"],
    ),
    # float32 graphs need opset 20; exported for the golden cases too.
    "flux-float32": ("flux-tiny", {"opset": 20, "steps": (2, 4)}, HEAVY),
    "qwen-float32": ("qwen-tiny", {"opset": 20, "steps": (2, 4)}, HEAVY),
}
SLOW = pytest.mark.slow
WITHOUT_BOUND = ("flux-float32", "qwen-float32")
NO_BOUND = pytest.mark.xfail(
    reason="at opset 20 the exporter gives no shapes to the operators that take the place of Attention",
    raises=TypeError,
    strict=True,
)


def build(root, *arguments):
    """The command's exit code, and its JSON or error text."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(
            ["build", str(root), "--backend", "tensorrt-rtx", "--target", "sm89", "--json", *map(str, arguments)]
        )
    return code, json.loads(out.getvalue())["engines"] if code == 0 else err.getvalue()


@pytest.fixture(scope="module")
def engines(bundles, command_run, tmp_path_factory):
    """A function case -> (bundle, rows of the build), built at 64x64 on first use."""
    made = {}

    def get(case):
        if case not in made:
            name, options, parts = CASES[case]
            source = command_run.bundle if case == "flux-bfloat16" else bundles(name, **options)
            root = tmp_path_factory.mktemp("engines") / "bundle"
            shutil.copytree(source, root)
            code, rows = build(root, "--resolutions", "64", "--parts", ",".join(parts))
            assert code == 0, rows
            made[case] = root, rows
        return made[case]

    return get


@pytest.fixture
def bundle(command_run, tmp_path):
    """A copy of the golden FLUX student in bfloat16, without engines."""
    return Path(shutil.copytree(command_run.bundle, tmp_path / "bundle"))


def tensors(path):
    """Name -> bytes of each tensor of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return {k: data[8 + size + v["data_offsets"][0] : 8 + size + v["data_offsets"][1]] for k, v in header.items()}


@pytest.mark.parametrize("case", [c if c == "flux-bfloat16" else pytest.param(c, marks=SLOW) for c in CASES])
def test_built_with_its_weights(engines, case):
    root, rows = engines(case)
    assert [row["part"] for row in rows] == CASES[case][2]
    weights, engine = tensors(root / "backbone.safetensors"), None
    (engine,) = (Path(row["file"]).read_bytes() for row in rows if row["part"] == "backbone")
    # The builder may lay tensors out anew, but most stay as they are.
    assert sum(w[:64] in engine for w in weights.values()) > 0.5 * len(weights)


@pytest.mark.parametrize(
    "case",
    [
        *("flux-bfloat16", *(pytest.param(c, marks=SLOW) for c in CASES if c not in (*WITHOUT_BOUND, "flux-bfloat16"))),
        *(pytest.param(c, marks=(SLOW, NO_BOUND)) for c in WITHOUT_BOUND),
    ],
)
def test_the_sums_bound_what_the_engines_need(engines, case):
    """The bound: results as if nothing were fused, and the scratch memory that every engine has."""
    bundle = Bundle.open(engines(case)[0])
    records = [record for _, record in read_records(bundle)]
    assert sorted(record.key.part for record in records) == sorted(CASES[case][2])
    for record in records:
        ((_, needed),) = engine_bytes(bundle, record).activations
        (profile,) = record.key.profiles
        graph = PartGraph.read(bundle, record.key.part)
        bound = graph.activation_bytes({name: shapes.max for name, shapes in profile.items()}, TENSORRT)
        assert 0.97 * TENSORRT.scratch_bytes < needed <= bound, record.key.part


def output_dtypes(root, part, kind):
    """Name -> dtype of what the layers of one kind give, in the network that the builder is given."""
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(Bundle.open(root).path(f"{part}.onnx")))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return {layer.name: layer.get_output(0).dtype for layer in layers if layer.type == kind}


@SLOW
def test_mixed_parts_keep_their_precisions_in_the_network(engines):
    root, rows = engines("flux-mixed")
    for part in ("backbone", "text_encoder_2"):
        assert set(output_dtypes(root, part, trt.LayerType.MATRIX_MULTIPLY).values()) == {trt.bfloat16}, part
    assert set(output_dtypes(root, "vae_decoder", trt.LayerType.CONVOLUTION).values()) == {trt.float16}
    records = [root / "engines" / f"{row['part']}-tensorrt-rtx-sm89.json" for row in rows]
    precisions = [json.loads(record.read_text())["key"]["precision"] for record in records]
    assert precisions == ["bfloat16"] * 4 + ["float16"]


@SLOW
def test_kept_linears_are_float32_in_the_network(engines):
    root, _ = engines("flux-kept")
    dtypes = output_dtypes(root, "backbone", trt.LayerType.MATRIX_MULTIPLY)
    kept = {name for name, dtype in dtypes.items() if dtype == trt.float32}
    assert kept == {"proj_out_means", *(f"transformer_blocks.{i}.ff.net.2" for i in range(2))}
    assert {dtype for name, dtype in dtypes.items() if name not in kept} == {trt.float16}


@pytest.mark.parametrize("case", ["flux-bfloat16", pytest.param("qwen-bfloat16", marks=SLOW)])
def test_found_by_the_runtime(engines, case):
    root, rows = engines(case)
    host = Host("tensorrt-rtx", trt.__version__, "sm89", None, this_platform())
    bundle = Bundle.open(root, "full")
    for row in rows:
        found = find_engine(bundle, row["part"], host, "full")
        assert (str(found.path), found.record.bytes) == (row["file"], row["bytes"])
        assert found.record.key.digest() == row["key"]


def test_unchanged_engines_are_not_built_again(engines):
    root, rows = engines("flux-bfloat16")
    began = time.perf_counter()
    code, again = build(root, "--resolutions", "64")
    assert code == 0
    assert again == [row | {"reused": True} for row in rows]
    assert time.perf_counter() - began < sum(row["build_seconds"] for row in rows) / 4


@pytest.mark.slow
def test_shapes_in_ranges_and_several_profiles(bundle):
    arguments = ("--parts", "vae_decoder,conditioner", "--batch", "1-2", "--resolutions", "64,32-128x64")
    options = ("--weight-streaming", "--optimization-level", "0", "--workspace", "0.5")
    code, rows = build(bundle, *arguments, *options)
    assert code == 0, rows
    record = json.loads((bundle / "engines" / "vae_decoder-tensorrt-rtx-sm89.json").read_text())
    assert record["key"]["profiles"] == [
        {"latents": {"min": [1, 4, 4, 64], "opt": [1, 4, 4, 64], "max": [2, 4, 4, 64]}},
        {"latents": {"min": [1, 2, 4, 64], "opt": [1, 8, 4, 64], "max": [2, 8, 4, 64]}},
    ]
    assert record["key"]["flags"] == ["-TF32", "WEIGHT_STREAMING"]
    # One figure per profile. The second profile's image is twice as large as the first's.
    static, ranged = record["activation_bytes"]
    assert 0 < static < ranged


def test_axes_with_one_value_are_static(bundle):
    opened = Bundle.open(bundle)
    profiles = make_profiles(opened.manifest, "backbone", parse_sizes("64"), SizeRange(1, 1))
    path = opened.path("backbone.onnx")
    fixed = fix_static_axes(path.read_bytes(), profiles)
    whole, given = onnx.load(path, load_external_data=False), onnx.load_from_string(fixed)
    assert (given.graph.node, given.graph.initializer) == (whole.graph.node, whole.graph.initializer)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse(fixed, str(path))
    shapes = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    assert shapes["latents"] == (1, 16, 64)
    assert shapes["image_rotary"][:2] == (2, 16)
    assert shapes["encoder_hidden_states"][:2] == (1, -1)


def test_float32_needs_opset_20(bundles, tmp_path):
    root = Path(shutil.copytree(bundles("flux-tiny", opset=23, steps=(2, 4)), tmp_path / "bundle"))
    code, err = build(root, "--parts", "text_encoder")
    assert code == 1
    assert (
        "error: text_encoder: tensorrt-rtx cannot build an engine of a float32 graph at opset 23, whose Attention "
        "operator has no float32 kernels; export with --opset 20, or with --dtype bfloat16 or float16:\n  "
    ) in err
    assert not (root / "engines").exists()


def test_weights_cannot_be_stripped_without_a_gpu(bundle):
    from arcflow_runtime.engines.gpus import find_gpu

    if find_gpu() is not None:
        pytest.skip("there is a GPU here")
    code, err = build(bundle, "--parts", "conditioner", "--strip-weights")
    assert code == 1
    assert (
        "conditioner: tensorrt-rtx cannot build an engine without its weights where there is no GPU; leave out" in err
    )
    assert not (bundle / "engines").exists()


def test_a_graph_that_the_parser_refuses(bundle):
    import onnx

    path = bundle / "conditioner.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Cos")
    node.op_type, node.name = "Cosine", "the_bad_node"
    onnx.save(model, path)
    edit_manifest(bundle, files={n: dataclasses.asdict(e) for n, e in list_files(bundle).items()})
    code, err = build(bundle, "--parts", "conditioner")
    assert code == 1
    assert f"error: conditioner: tensorrt-rtx cannot read {path}:\n  node 'the_bad_node' (Cosine): " in err
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing(bundle, sent, code):
    command = [sys.executable, "-m", "arcflow_runtime.cli", "build", str(bundle), "--backend", "tensorrt-rtx"]
    process = subprocess.Popen(
        [*command, "--target", "sm89", "--parts", "backbone"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell may start pytest with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    partial = bundle / "engines" / "backbone-tensorrt-rtx-sm89.partial"
    while not partial.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    assert process.wait() == code, process.stderr.read()
    process.stderr.close()
    assert "engines" not in os.listdir(bundle)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_attention_without_a_kernel_says_what_to_do(tmp_path, precision):
    root = make_bundle(tmp_path / "bundle")
    library = LIBRARIES["tensorrt-rtx"]
    bundle = attention_bundle(root, 8, precision)
    with pytest.raises(EngineError) as error:
        build_engine(library, bundle, "p", "sm89", (attention_profile(8),), BuildSettings(), io.BytesIO())
    assert str(error.value).splitlines()[0] == (
        "p: tensorrt-rtx cannot build an engine of a graph at opset 23: its Attention operator has no kernel for heads "
        "of this size; export with --opset 20, which writes attention as separate operators:"
    )
    out = io.BytesIO()
    bundle = attention_bundle(root, 32, precision)
    build_engine(library, bundle, "p", "sm89", (attention_profile(32),), BuildSettings(), out)
    assert out.tell() > 0


#: Scores of this many tokens in float32 take 4 * TOKENS ** 2 = 17.2 GB: as much as makes the builder give up allocating
#: scratch memory once, and allocate in each run.
TOKENS = 1 << 16


@pytest.fixture
def product(tmp_path):
    """A function (largest number of tokens, settings, library) -> report of the build of `product_bundle`."""
    bundle = product_bundle(make_bundle(tmp_path / "bundle"))

    def build(tokens, settings, library=LIBRARIES["tensorrt-rtx"]):
        return build_engine(library, bundle, "p", "sm89", (product_profile(tokens),), settings, io.BytesIO())

    return build


def test_no_engine_allocates_when_it_runs(product):
    report = product(TOKENS, BuildSettings())
    assert not report.allocates_when_run
    (activations,) = report.activation_bytes
    assert activations >= 4 * TOKENS**2


def test_an_engine_that_allocates_when_it_runs_is_reported(product):
    # Streamed weights are refused beside the flag that forbids it.
    report = product(TOKENS, BuildSettings(weight_streaming=True))
    assert report.allocates_when_run
    assert not product(1024, BuildSettings(weight_streaming=True)).allocates_when_run


def test_shapes_that_need_too_much_memory(product):
    with pytest.raises(EngineError) as error:
        product(2 * TOKENS, BuildSettings())
    assert str(error.value).splitlines()[0] == (
        "p: tensorrt-rtx cannot build an engine: its largest shapes need more scratch memory than the 68.7 GB that it "
        "may have; give smaller --resolutions or a smaller --batch:"
    )
    with pytest.raises(EngineError) as error:
        product(TOKENS, BuildSettings(workspace_bytes=1 << 30))
    assert str(error.value).splitlines()[0] == (
        "p: tensorrt-rtx cannot build an engine: its largest shapes need more scratch memory than the 1.1 GB that it "
        "may have; give smaller --resolutions or a smaller --batch, or a larger --workspace:"
    )


@pytest.fixture
def configure(tmp_path):
    """A function (library, settings) -> the real builder's configuration."""
    bundle = product_bundle(make_bundle(tmp_path / "bundle"))
    kept = []

    def get(library, settings):
        kept.append(trt.Builder(trt.Logger(trt.Logger.ERROR)))
        config = kept[-1].create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, False)
        _Build(library, trt, bundle, "p")._configure(config, "sm89", settings)
        return config

    return get


def test_products_in_float32_are_not_rounded_to_tf32(configure):
    flag, library = trt.BuilderFlag.TF32, LIBRARIES["tensorrt-rtx"]
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    assert builder.create_builder_config().get_flag(flag)
    for settings in (BuildSettings(), BuildSettings(weight_streaming=True), BuildSettings(strip_weights=True)):
        assert not configure(library, settings).get_flag(flag)
        # An engine that was built with TF32 is built again.
        assert "-TF32" in settings.flags(library)


def test_flags_of_both_libraries(configure):
    rtx, resize = LIBRARIES["tensorrt-rtx"], trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10
    own = trt.BuilderFlag.REQUIRE_USER_ALLOCATION
    assert configure(rtx, BuildSettings()).get_flag(own)
    assert not configure(rtx, BuildSettings(weight_streaming=True)).get_flag(own)
    # TensorRT's flags on the configuration of TensorRT-RTX, which has the same names.
    tensorrt = dataclasses.replace(rtx, flags=LIBRARIES["tensorrt"].flags)
    for settings in (BuildSettings(), BuildSettings(weight_streaming=True)):
        assert configure(tensorrt, settings).get_preview_feature(resize)
        assert "RUNTIME_ACTIVATION_RESIZE_10_10" in settings.flags(tensorrt)


def test_the_library_knows_the_targets():
    names = {name.lower() for name in trt.ComputeCapability.__members__} - {"none", "current"}
    assert set(LIBRARIES["tensorrt-rtx"].targets) == names
