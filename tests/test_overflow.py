"""float16 that overflows: found out with the layer's name, and gone when that layer stays in float32."""

from __future__ import annotations

import json
import math
import shutil

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from arcflow_export.student.keep import FLOAT16_MAX
from arcflow_export.verify.overflow import _only_softmax, _remedy, _watch, _widened
from arcflow_runtime import Pipeline, cli
from arcflow_runtime.errors import EngineError
from tests.checkpoints import open_student
from tests.conftest import GOLDEN, export

#: In a double block's image stream, where nothing clips and the next layer norm brings the numbers back.
LAYER = "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A student that is fine in float32, with one linear whose outputs are beyond float16's range."""
    root = shutil.copytree(GOLDEN / "flux-tiny", tmp_path_factory.mktemp("overflowing") / "student")
    (path,) = (root / "base" / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    tensors[f"{LAYER}.weight"] *= 3e5
    assert tensors[f"{LAYER}.weight"].abs().max() < FLOAT16_MAX, "the weights themselves must fit"
    save_file(tensors, path, metadata={"format": "pt"})
    return root


def verify(root, bundle, capsys, *arguments):
    arguments = ("--base", root / "base", "--adapter", root / "adapter", "--width", 32, "--height", 48, *arguments)
    code = cli.main(["verify", str(bundle), *map(str, arguments), "--prompt", "a red circle"])
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_an_overflowing_layer_is_named_and_kept(root, capsys):
    """The plain float16 bundle fails at the layer; with what verify says to keep, the same student passes."""
    code, out = verify(root, export(open_student(root), root / "plain", dtype="float16"), capsys, "--json")
    assert code == 1
    result = json.loads(out, parse_constant=pytest.fail)  # no NaN in JSON
    rows = {row["what"]: row for row in result["rows"]}
    row = rows["backbone: reach into float16"]
    assert row["error"] > 1 and not row["passed"]
    assert (row["node"], row["layers"]) == (LAYER, [LAYER])
    assert result["keep_float32"] == [LAYER]
    assert rows["step 0 means"]["error"] is None and rows["end to end: image"]["error"] is None
    passed = {what for what, row in rows.items() if row["passed"]}
    others = {f"{part}: reach into float16" for part in ("text_encoder", "text_encoder_2", "conditioner")}
    assert passed == others | {"text states", "pooled text", "vae image"}

    student = open_student(root)
    kept = export(student, root / "kept", dtype="float16", keep_float32=tuple(result["keep_float32"]))
    code, out = verify(root, kept, capsys)
    assert code == 0, out
    assert "backbone: reach into float16" in out

    # The runtime itself, whose parts in float16 and float32 pass values to each other.
    with Pipeline.load(root / "plain") as pipe, pytest.raises(EngineError, match="must be finite, got NaN or Inf"):
        pipe("a red circle", height=48, width=32, seed=0)
    with Pipeline.load(kept) as pipe:
        image = pipe("a red circle", height=48, width=32, seed=0, output_type="numpy").images[0]
    assert image.min() < image.max()


def test_advice():
    from arcflow_export.commands.verify import _advice
    from arcflow_export.verify.verify import VerifyRow

    row = VerifyRow(0, "backbone: reach into float16", 2.0, 1.0, "a.b", ("a.b", "c"))
    assert not row.passed
    assert _advice([row], row.layers) == (
        "float16 overflows in backbone, first at a.b. Export again with --precision backbone=bfloat16, or with\n"
        "  --keep-float32 a.b,c"
    )
    row = VerifyRow(0, "vae_decoder: reach into float16", math.inf, 1.0, "Conv node_7")
    assert _advice([row], ()) == (
        "float16 overflows in vae_decoder, first at Conv node_7. Export again with --precision vae_decoder=bfloat16"
    )


def graph(nodes, weights):
    """A float16 graph from x [2, 4] to y; `weights` are 4 by 4."""
    fp16 = TensorProto.FLOAT16
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", fp16, [2, 4])],
        [helper.make_tensor_value_info("y", fp16, [2, 4])],
        [helper.make_tensor(name, fp16, [4, 4], [0.5] * 16) for name in weights],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph


def test_what_only_saturates_is_no_overflow():
    """x^3 in the tanh form of GELU passes 65504 from x = 40 on, and its limit is right."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="w"),
        helper.make_node("Pow", ["a", "a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("Mul", ["a", "d"], ["y"]),
    ]
    assert [value.name for value in _watch(graph(nodes, ["w"]))] == ["a", "d", "y"]


def test_a_mask_is_no_overflow():
    """A causal mask adds the lowest number of all; what falls below it is as good as masked."""
    low = helper.make_tensor("low", TensorProto.FLOAT16, [], [-65504.0])
    nodes = [
        helper.make_node("Constant", [], ["mask"], value=low),
        helper.make_node("MatMul", ["x", "w"], ["a"], name="w"),
        helper.make_node("Add", ["a", "mask"], ["b"]),
        helper.make_node("Softmax", ["b"], ["y"]),
    ]
    made = graph(nodes, ["w"])
    by_name = {value.name: value for node in made for value in node.outputs}
    assert _only_softmax(by_name["b"])
    assert not _only_softmax(by_name["a"]) and not _only_softmax(by_name["y"])


def test_one_kept_linear_stands_for_the_stream_behind_it():
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "second"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "third"], ["y"], name="third"),
    ]
    made = graph(nodes, ["first", "second", "third"])
    by_name = {value.name: value for node in made for value in node.outputs}
    remedies = {name: [linear.name for linear in _remedy(value)] for name, value in by_name.items()}
    assert remedies["b"] == ["second"]
    assert remedies["a"] == ["first", "second"], "what takes an overflowing value must take it in float32"
    assert remedies["d"][1:] == ["third"]
    second = by_name["b"].producer()
    assert {value.name for value in _widened(second)} == {"b", "c", "d"}
