"""Ranks and inputs of LoRA slots for engines on a GPU; the runs themselves are in tests/host_cuda/lora_cases.py."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from arcflow_runtime import Bundle
from arcflow_runtime.disk.manifest import LoraSlots, SlotLayer
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend, open_session
from arcflow_runtime.gpu.loras import pad_inputs, padded_rank
from arcflow_runtime.gpu.onnxruntime import OrtArrayEngine
from arcflow_runtime.lora.open import open_lora
from arcflow_runtime.lora.prepare import prepare
from tests.lora_slots import write_lora


@pytest.mark.parametrize(("ranks", "expected"), [((), 8), ((8,), 8), ((16, 8), 16), ((24,), 32), ((40,), 48)])
def test_ranks_of_arenas(ranks, expected):
    slots = LoraSlots({"q": SlotLayer(4, 5, "float32")}, 8, 48)
    assert padded_rank(slots, ranks) == expected


def test_inputs_are_padded_with_zeros():
    slots = LoraSlots({"q": SlotLayer(4, 5, "float32"), "k": SlotLayer(4, 5, "float16")}, 8, 64)
    a = np.arange(4 * 24, dtype=np.float32).reshape(4, 3, 8)
    b = np.arange(24 * 5, dtype=np.float32).reshape(3, 8, 5)
    padded = pad_inputs(slots, {"q.lora_a": a, "q.lora_b": b})
    assert {n: (x.shape, x.dtype.name) for n, x in padded.items()} == {
        "q.lora_a": ((4, 4, 8), "float32"),
        "q.lora_b": ((4, 8, 5), "float32"),
        "k.lora_a": ((4, 4, 8), "float16"),
        "k.lora_b": ((4, 8, 5), "float16"),
    }
    flat = padded["q.lora_a"].reshape(4, 32) @ padded["q.lora_b"].reshape(32, 5)
    np.testing.assert_array_equal(flat, a.reshape(4, 24) @ b.reshape(24, 5))
    assert not padded["k.lora_a"].any() and not padded["k.lora_b"].any()


def test_without_cuda_core_parts_run_on_host_arrays(bundles, tmp_path):
    bundle = Bundle.open(bundles("flux-tiny", lora_slots=("*",), lora_max_rank=32))
    manifest = bundle.manifest
    path = write_lora(tmp_path / "ink.safetensors", manifest.slots(), 12)
    loras = prepare(manifest, [(0, open_lora(path, "ink", manifest), 0.5)])
    session = open_session(bundle, "text_encoder", ort.SessionOptions(), ["CPUExecutionProvider"])
    padded = OrtArrayEngine("text_encoder", manifest.parts["text_encoder"], session)
    exact = OnnxRuntimeBackend(1).open(bundle, "text_encoder")
    ids = {"input_ids": np.full((1, 77), 5, np.int64)}
    for given in (ids, ids | dict(loras.of("text_encoder"))):
        found, expected = (engine.run(given)["pooled_projections"] for engine in (padded, exact))
        np.testing.assert_array_equal(found, expected)
