"""What a call of a part does: counted before the export and on the graph, which must agree; and sums known by hand."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from arcflow_export.costs.costs import Cost, GateWork, check_fits, duration, gate_cost, misfit
from arcflow_export.costs.machine import Machine
from arcflow_export.costs.work import PartWork, bundle_work, call_sizes, graph_flops, part_work
from arcflow_export.errors import ExportError
from arcflow_runtime.disk.bundle import Bundle
from tests.conftest import FAMILIES, golden_student

GIB = 1 << 30
SIZES = call_sizes(256, 128, 64, 2)
MACHINE = Machine(8 * GIB, 10 * 10**9, 1e11, 2e11, 1e9, 1e9, 1e9, 5e7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_and_its_graph_do_the_same(bundles, family):
    """torch counts the modules, this project the exported graphs: two sums of the same products."""
    bundle = Bundle.open(bundles(family))
    for part in golden_student(family).parts("float32"):
        if part.name not in bundle.manifest.parts:  # a baked conditioner
            continue
        before, after = part_work(part, SIZES), bundle_work(bundle, part.name, SIZES)
        assert before.flops == after.flops > 0, part.name
        assert before.activation == after.activation, part.name
        # The file has a header, and each tensor starts at a multiple of 4 KiB.
        assert 0 <= after.weight_bytes - before.weight_bytes <= 4096 * (before.tensors + 4), part.name


def test_products_attention_and_convolutions_by_hand():
    def value(name, *shape):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def node(op, inputs, *shape, **attributes):
        made = ir.node(op, inputs, attributes=attributes)
        made.outputs[0].shape = ir.Shape(shape)
        return made

    x, w = value("x", "batch", "image_tokens", 8), value("w", 8, 12)
    q, k = value("q", "batch", 2, "image_tokens", 4), value("k", "batch", 2, 5, 4)
    image, kernel = value("i", "batch", 3, 10, 10), value("c", 7, 3, 3, 3)
    product = node("MatMul", [x, w], "batch", "image_tokens", 12)
    attention = node("Attention", [q, k, k], "batch", 2, "image_tokens", 4)
    convolution = node("Conv", [image, kernel], "batch", 7, 10, 10)
    graph = ir.Graph([x, w, q, k, image, kernel], [], nodes=[product, attention, convolution])
    expected = 2 * 6 * 8 * 12 + 2 * 2 * (2 * 6 * 4 * 5) + 2 * (7 * 10 * 10) * (3 * 3 * 3)
    assert graph_flops(graph, {"batch": 1, "image_tokens": 6}) == expected


def test_what_does_not_fit_is_refused_with_what_makes_it_fit():
    large = Cost("verify", 10.0, 9 * GIB, 0, "give --limit")
    with pytest.raises(ExportError) as error:
        check_fits(large, MACHINE)
    assert str(error.value) == (
        "verify needs 9.0 GiB of memory, 8.0 are free; give --limit (--anyway starts it nevertheless)"
    )
    full = Cost("export", 10.0, GIB, 34 * 10**9)
    assert misfit(full, MACHINE) == (
        "export needs 34.0 GB of disk, 10.0 are free; free some disk, or use another machine"
    )
    assert misfit(Cost("export", None, 8 * GIB, 10 * 10**9), MACHINE) is None
    assert large.sentence() == "verify: about 10 s, 9.0 GiB of memory"
    assert full.sentence() == "export: about 10 s, 1.0 GiB of memory, 34.0 GB of disk"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5940, "99 min"), (6000, "1 h 40 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_gate_of_twice_the_prompts_takes_as_much_longer_and_no_more_memory():
    """By hand: two steps run the reference twice, the candidate three times, and the layers' reference twice again."""
    backbone = PartWork(10**9, 4 * 10**9, 100, 10**7, 10**12, 1000, "float32")
    other = PartWork(1, 4, 1, 1, 0, 1, "float32")
    parts = {"text_encoder": other, "backbone": backbone, "vae_decoder": other}

    def cost(cases, **changes):
        given = {"text_differs": False, "decoder_differs": False, "layers": 1.0, "kept_bytes": GIB}
        return gate_cost(parts, GateWork(cases, 2, **given | changes), MACHINE)

    one, two = cost(1), cost(2)
    # Reference 2, given 2, own 1, layers 2 with their quantised linears beside them: 2 more.
    assert two.seconds - one.seconds == pytest.approx(1.4 * 9 * 10**12 / 1e11)
    assert one.memory_bytes == two.memory_bytes
    assert cost(2, layers=0.0).seconds < two.seconds and cost(2, end_to_end=False).seconds < two.seconds
