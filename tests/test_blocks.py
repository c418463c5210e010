"""Graphs run piece by piece: the same numbers as in one piece, one piece's weights at a time, and no cut inside FP8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from arcflow_export.drift.cases import DriftCase
from arcflow_export.emulate import blocks
from arcflow_export.emulate.blocks import BlockEngine, EmulatedBackend, cut
from arcflow_export.emulate.emulate import load_graph, widened
from arcflow_export.emulate.sizes import bind
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.errors import EngineError
from tests.quantized import make_fp8

SIZES = {"batch": 2, "image_tokens": 24, "text_tokens": 16, "latent_height": 4, "latent_width": 6, "steps": 2}
#: Sums of float32 products are the same up to their order, which ONNX Runtime chooses by what it fuses in a graph.
ROUNDING = 2e-6


def inputs_of(bundle: Bundle, part: str, seed: int = 0) -> dict[str, np.ndarray]:
    draw, found = np.random.default_rng(seed), {}
    for spec in bundle.manifest.parts[part].inputs:
        shape = [SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        numbers = draw.integers(0, 30, shape) if spec.dtype == "int64" else draw.standard_normal(shape)
        found[spec.name] = numbers.astype(np.int64 if spec.dtype == "int64" else np.float32)
    return found


def engine(bundle: Bundle, part: str, pieces: int) -> BlockEngine:
    """The part in about so many pieces."""
    model = load_graph(bundle, part)
    weights = sum(4 * v.const_value.size for v in model.graph.initializers.values())
    return BlockEngine(part, model, piece_bytes=-(-weights // pieces))


@pytest.fixture(scope="module")
def fp8(bundles, tmp_path_factory):
    return make_fp8(bundles("flux-tiny"), tmp_path_factory.mktemp("fp8") / "bundle", (DriftCase("a red circle", 0),))


@pytest.fixture(params=["flux-tiny", "qwen-tiny", "bfloat16", "fp8"])
def bundle(request, bundles, command_run, fp8):
    root = {"bfloat16": lambda: command_run.bundle, "fp8": lambda: fp8}.get(
        request.param, lambda: bundles(request.param)
    )()
    return widened(Bundle.open(root))


def test_pieces_are_the_whole_for_every_part_and_batch(bundle):
    for part in bundle.manifest.parts:
        whole, cut_up = engine(bundle, part, 1), engine(bundle, part, 6)
        assert len(whole.pieces) == 1 and len(cut_up.pieces) >= 4, part
        batches = [inputs_of(bundle, part, seed) for seed in range(2)]
        for batch, found in zip(batches, cut_up.run_all(batches), strict=True):
            expected = whole.run(batch)
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                # Images are whole numbers: a value that lies between two of them may go either way.
                bound = 1 if array.dtype == np.uint8 else ROUNDING * np.abs(array).max()
                np.testing.assert_allclose(found[name].astype(np.float64), array, atol=bound, rtol=0, err_msg=part)


def test_weights_of_one_piece_are_in_memory_at_a_time(bundles, monkeypatch):
    bundle = widened(Bundle.open(bundles("flux-tiny")))
    events = []

    class Session(blocks._Session):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.place = len({e for e in events if e[0] == "open"})
            events.append(("open", self.place, sum(v.numpy().nbytes for v in self._mapped)))

        def close(self):
            tensors = self._mapped
            super().close()
            assert all(t.raw is None for t in tensors), "a file is still mapped"
            events.append(("close", self.place))

    monkeypatch.setattr(blocks, "_Session", Session)
    monkeypatch.setattr(blocks, "_INLINE_BYTES", 1 << 10)
    part = engine(bundle, "backbone", 5)
    list(part.run_all([inputs_of(bundle, "backbone", seed) for seed in range(3)]))
    opened = [e for e in events if e[0] == "open"]
    # Each is opened once for all three batches, and closed before the next.
    assert [e[0] for e in events] == ["open", "close"] * len(part.pieces)
    total = bundle.manifest.files["backbone.safetensors"].bytes
    assert max(e[2] for e in opened) <= total / 5 < sum(e[2] for e in opened) <= total


def test_no_piece_ends_inside_a_quantised_linear(fp8):
    model = load_graph(Bundle.open(fp8), "backbone")
    for piece in cut(model.graph, 50_000):
        for value in piece.inputs:
            producer = value.producer()
            assert producer is None or producer.op_type not in ("QuantizeLinear", "DequantizeLinear"), value.name
            assert value.dtype != ir.DataType.FLOAT8E4M3FN


@pytest.mark.slow
def test_a_single_node_may_have_more_than_a_piece(bundles):
    bundle = widened(Bundle.open(bundles("flux-tiny")))
    smallest = BlockEngine("backbone", load_graph(bundle, "backbone"), piece_bytes=1)
    batch = inputs_of(bundle, "backbone")
    expected = EmulatedBackend().open(bundle, "backbone").run(batch)["means"]
    bound = ROUNDING * np.abs(expected).max()
    np.testing.assert_allclose(smallest.run(batch)["means"], expected, atol=bound, rtol=0)


def test_what_is_kept_between_pieces_is_counted(bundles):
    """Of a FLUX block: the hidden states of image and text, and what of the modulation is still to be used."""
    bundle = Bundle.open(bundles("flux-tiny"))
    part = engine(bundle, "backbone", 6)
    sizes = bind(part._model.graph.inputs, inputs_of(bundle, "backbone"))
    hidden = 4 * SIZES["batch"] * (SIZES["image_tokens"] + SIZES["text_tokens"]) * 64
    assert hidden <= part.kept_bytes(sizes) < 4 * hidden
    assert engine(bundle, "backbone", 1).kept_bytes(sizes) == 0


def test_an_error_names_the_part_and_the_shapes(bundles):
    bundle = Bundle.open(bundles("flux-tiny"))
    batch = inputs_of(bundle, "backbone") | {"latents": np.zeros((2, 24, 63), np.float32)}
    with pytest.raises(
        EngineError, match=r"^backbone: ONNX Runtime failed on inputs \{.*'latents': 'float32\[2, 24, 63\]'"
    ):
        engine(bundle, "backbone", 1).run(batch)


def test_a_closed_engine_says_so(bundles):
    part = engine(Bundle.open(bundles("flux-tiny")), "backbone", 3)
    part.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        part.run({})
