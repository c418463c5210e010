"""LoRAs on the device made of this process's memory: the pictures of the ordinary pipeline, and what is copied when."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from host_device import HostBackend, HostDevice, at

from arcflow_runtime import Bundle, EngineError, Pipeline, RequestError
from arcflow_runtime.disk.manifest import LoraSlots, SlotLayer
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend, open_session
from arcflow_runtime.gpu.loras import LoraArenas, pad_inputs, padded_rank
from arcflow_runtime.gpu.onnxruntime import OrtArrayEngine
from arcflow_runtime.lora.prepare import NO_LORAS
from tests.lora_slots import write_lora

ALL = {"lora_slots": ("*",), "lora_max_rank": 32}
#: With the ordinary pipeline a graph runs at the LoRAs' own ranks and here at padded ones, and the conditioner for each
#: image; products of zeros change no bit, another batch a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def roots(bundles, tmp_path_factory):
    """Name -> bundle, and a LoRA of rank 4, 12 and 30 for it."""
    folder = tmp_path_factory.mktemp("loras")

    def get(name):
        golden, options = {"flux": ("flux-tiny", {}), "qwen": ("qwen-tiny", {}),
                           "float16": ("flux-tiny", {"dtype": "float16"})}[name]  # fmt: skip
        root = bundles(golden, **ALL, **options)
        files = {}
        for rank in (4, 12, 30):
            files[f"r{rank}"] = folder / f"{name}-{rank}.safetensors"
            if not files[f"r{rank}"].exists():
                write_lora(files[f"r{rank}"], Bundle.open(root).manifest.slots(), rank, rank)
        return root, files

    return get


@pytest.fixture
def both(roots):
    """A function name -> the ordinary pipeline and one on the device, with the same LoRAs."""
    made = []

    def get(name, low_memory=False, **arguments):
        root, files = roots(name)
        plain = Pipeline(Bundle.open(root), OnnxRuntimeBackend(1))
        backend = HostBackend(**arguments)
        pipe = Pipeline(Bundle.open(root), backend, low_memory)
        pipe.backend = backend
        for lora, file in files.items():
            plain.load_lora(file, lora)
            pipe.load_lora(file, lora)
        made.append(pipe)
        return plain, pipe

    yield get
    for pipe in made:
        pipe.close()
        assert not pipe.backend.device.live, "memory that was not freed"


def draw(pipe, loras=None, **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe("a red circle", **(defaults | arguments), loras=loras).images


#: Of every rank, so that each is used for the first time, replaced and used again.
SETS = ({}, {"r4": 1}, {"r12": 0.5}, {"r4": 1}, {"r30": 1}, {"r4": 0.5, "r12": 0.5}, {}, {"r4": -1}, {"r30": -1})


@pytest.mark.parametrize("name", ["flux", "qwen", "float16"])
def test_the_picture_is_that_of_the_ordinary_pipeline(name, both):
    plain, pipe = both(name)
    for loras in SETS:
        np.testing.assert_allclose(draw(pipe, loras), draw(plain, loras), **CLOSE)
    np.testing.assert_array_equal(draw(pipe, SETS[1]), draw(pipe, SETS[1]))


def test_low_memory(both):
    plain, pipe = both("flux", low_memory=True)
    for loras in SETS[:4]:
        np.testing.assert_allclose(draw(pipe, loras), draw(plain, loras), **CLOSE)


def test_a_switch_is_one_copy_and_the_graph_stays(both):
    _, pipe = both("flux")
    device = pipe.backend.device
    first = {"r4": 0.8}
    for loras in (first, first, {"r12": 0.5}):  # ranks 8 and 16 have a plan each
        draw(pipe, loras)
    second = {"r4": -0.5}
    draw(pipe, second)
    assert device.captures == 1
    a, b = draw(pipe, first), draw(pipe, second)
    before = device.enqueued
    np.testing.assert_array_equal(draw(pipe, second), b)
    replay = device.enqueued - before
    before = device.enqueued
    np.testing.assert_array_equal(draw(pipe, first), a)
    assert device.enqueued - before == replay + 1
    assert device.captures == 1


def test_requests_without_a_lora_have_the_smallest_rank(both):
    _, pipe = both("flux")
    draw(pipe)
    backbone = dict(pipe.backend.contexts)["backbone"]
    assert {shape[1] for name, shape in backbone.items() if name.endswith(".lora_a")} == {1}
    draw(pipe, {"r30": 1})
    backbone = dict(pipe.backend.contexts)["backbone"]
    assert {shape[1] for name, shape in backbone.items() if name.endswith(".lora_a")} == {4}


def test_warm_up_captures_a_graph_for_each_rank(both):
    plain, pipe = both("flux")
    pipe.warm_up([(1, 32, 48)], text_tokens=16, lora_ranks=(16, 32))
    device = pipe.backend.device
    assert device.captures == 3
    for loras in ({}, {"r12": 0.5}, {"r30": 1}):
        np.testing.assert_allclose(draw(pipe, loras), draw(plain, loras), **CLOSE)
    assert device.captures == 3
    with pytest.raises(RequestError, match=r"^lora_ranks must be between 1 and 32 for this bundle, got 40$"):
        pipe.warm_up([(1, 32, 48)], lora_ranks=(40,))


def test_kept_sets_are_bounded(roots):
    root, files = roots("flux")
    pipe = Pipeline(Bundle.open(root), OnnxRuntimeBackend(1))
    pipe.load_lora(files["r4"], "r4")
    backend = HostBackend()
    manifest = pipe.bundle.manifest
    with backend.lane.enter() as stream:
        arenas = LoraArenas(backend.lane, manifest, ("backbone",), sets=2)
        used = []
        for scale in (1.0, 2.0, 3.0, 1.0, 0.0):
            loras = pipe._loras.get((("r4", scale),)) if scale else NO_LORAS
            assert arenas.rank(loras) == 8
            arenas.put(loras, 8, stream)
            stream.wait()
            used.append(backend.device.used_bytes())
            name, address = next(iter(arenas.addresses("backbone", 8).items()))
            wanted = pad_inputs(manifest.parts["backbone"].lora, loras.of("backbone"))[name]
            np.testing.assert_array_equal(at(address, wanted.shape, "float32"), wanted)
        # An arena and one, then two sets; never a third.
        assert [u // (used[0] // 2) for u in used] == [2, 3, 3, 3, 3]
        arenas.release()
    assert not backend.device.live


def test_too_little_memory_is_an_error_that_says_what_for(both, roots):
    _, pipe = both("flux", device=HostDevice(capacity=2 << 20))
    with pytest.raises(EngineError, match=r"^LoRAs of rank 32 need [\d,]+ bytes of Host 1's memory, "):
        draw(pipe, {"r30": 1})
    draw(pipe)


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


def test_without_cuda_core_parts_run_on_host_arrays(roots):
    root, files = roots("flux")
    plain = Pipeline(Bundle.open(root), OnnxRuntimeBackend(1))
    plain.load_lora(files["r12"], "r12")
    loras, bundle = plain._loras.get((("r12", 0.5),)), plain.bundle
    session = open_session(bundle, "text_encoder", ort.SessionOptions(), ["CPUExecutionProvider"])
    engine = OrtArrayEngine("text_encoder", bundle.manifest.parts["text_encoder"], session)
    ids = {"input_ids": np.full((1, 77), 5, np.int64)}
    for given in (ids, ids | dict(loras.of("text_encoder"))):
        with plain._parts.use("text_encoder") as run:
            np.testing.assert_array_equal(engine.run(given)["pooled_projections"], run(given)["pooled_projections"])
