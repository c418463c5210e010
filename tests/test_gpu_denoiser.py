"""The GPU pipeline on a device made of this process's memory: its pictures must be those of the ordinary pipeline.

Both run the same graphs with ONNX Runtime on the same inputs and the same update, image by image, so latents agree to
rounding of the conditioner's batch: it runs per distinct prompt there and per image here.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from host_device import HostBackend, HostContext, HostDevice

from arcflow_runtime import EngineError, Pipeline, RequestError
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")


@pytest.fixture(scope="module")
def open_bundle(bundles):
    roots = {
        "flux": lambda: bundles("flux-tiny"),
        "qwen": lambda: bundles("qwen-tiny"),
        "conditioner": lambda: bundles("qwen-tiny", keep_conditioner=True),
        "float16": lambda: bundles("flux-tiny", dtype="float16"),
    }
    return lambda name: Bundle.open(roots[name]())


@pytest.fixture(scope="module")
def plain(open_bundle):
    """Ordinary pipelines by name, opened when first asked for."""

    class Plain(dict):
        def __missing__(self, name):
            self[name] = Pipeline(open_bundle(name), OnnxRuntimeBackend(1))
            return self[name]

    return Plain()


@pytest.fixture
def on_device(open_bundle):
    made = []

    def make(name="flux", memory=None, **arguments):
        backend = HostBackend(**arguments)
        pipe = Pipeline(open_bundle(name), backend, memory)
        pipe.backend = backend
        made.append(pipe)
        return pipe

    yield make
    for pipe in made:
        pipe.close()
        assert not pipe.backend.device.live, "memory that was not freed"
        assert pipe.backend.open_contexts == 0
        assert pipe.backend.opened == set()


def draw(pipe, prompt=PROMPTS[0], **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe(prompt, **(defaults | arguments)).images


def pixels(images):
    return np.stack([np.asarray(i) for i in images]).astype(int)


@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner"])
def test_three_ways_of_running_give_the_ordinary_picture(name, on_device, plain):
    pipe = on_device(name)
    device = pipe.backend.device
    steps = 3 if name == "conditioner" else 2
    expected = draw(plain[name], num_inference_steps=steps)
    first = draw(pipe, num_inference_steps=steps)
    assert (device.captures, device.launches) == (0, 0)
    second = draw(pipe, num_inference_steps=steps)
    assert (device.captures, device.launches) == (1, 1)
    before = device.enqueued
    third = draw(pipe, num_inference_steps=steps)
    assert (device.captures, device.launches) == (1, 2)
    assert device.enqueued > before
    np.testing.assert_allclose(first, expected, **CLOSE)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(third, first)


def test_float16(on_device, plain):
    """The state is float32 and what the backbone reads is that in float16, after every step too.

    One image alone runs the same graphs on the same inputs as in the ordinary pipeline, to the last bit.
    """
    pipe = on_device("float16")
    wanted = draw(plain["float16"])
    for _ in range(3):
        np.testing.assert_array_equal(draw(pipe), wanted)
    assert "input" in next(iter(pipe.backend.denoiser._plans.values())).buffers


@pytest.mark.parametrize("memory", MODES)
def test_modulation_by_way_of_the_host(memory, on_device, plain, monkeypatch):
    """This is how a conditioner runs whose dtype differs from the backbone's."""
    monkeypatch.setattr("arcflow_runtime.gpu.denoiser.DeviceDenoiser._modulation_source", lambda self, d: "given")
    pipe = on_device(memory=memory)
    for prompt in (*PROMPTS, PROMPTS[0]):
        np.testing.assert_allclose(draw(pipe, prompt), draw(plain["flux"], prompt), **CLOSE)
    assert pipe.backend.device.captures == (0 if memory == "low" else 1)


def test_a_replay_draws_what_is_staged(on_device, plain):
    """The inner loop changes the guidance alone, with the same seed and prompt."""
    pipe = on_device()
    for seed in (1, 1, 2, 3):
        for prompt in PROMPTS:
            for guidance in (3.5, 7.0):
                found = draw(pipe, prompt, seed=seed, guidance_scale=guidance)
                expected = draw(plain["flux"], prompt, seed=seed, guidance_scale=guidance)
                np.testing.assert_allclose(found, expected, **CLOSE)
    assert pipe.backend.device.captures == 1
    # one launch for every picture after the first
    assert pipe.backend.device.launches == 15


def test_pictures_of_every_kind(on_device, plain):
    pipe = on_device()
    for kind in ("pil", "numpy", "latents"):
        for _ in range(2):
            found = draw(pipe, output_type=kind, num_images_per_prompt=2)
            expected = draw(plain["flux"], output_type=kind, num_images_per_prompt=2)
            if kind == "pil":
                # A value that falls on the other side of a rounding is one level off.
                assert np.abs(pixels(found) - pixels(expected)).max() <= 1
            else:
                np.testing.assert_allclose(found, expected, rtol=0, atol=1.5 / 255 if kind == "numpy" else 2e-5)
    # "pil" and "numpy" are drawn by one graph: the device's work is the same
    assert pipe.backend.device.captures == 2


def test_groups_by_text_length(on_device, plain):
    pipe = on_device("qwen")
    prompts, whole = ["aa", "bbbb", "aa", "cc"], {"max_sequence_length": 256}
    for _ in range(2):
        np.testing.assert_allclose(draw(pipe, prompts, **whole), draw(plain["qwen"], prompts, **whole), **CLOSE)
    shapes = {i["encoder_hidden_states"] for p, i in pipe.backend.contexts if p == "backbone"}
    assert sorted(s[0] for s in shapes) == [1, 3]
    assert pipe.backend.device.captures == 2


def test_modulation_from_a_table_is_on_the_device_once(on_device):
    pipe = on_device("qwen")
    draw(pipe)
    draw(pipe)
    assert "conditioner" not in pipe.backend.opens
    assert set(pipe.backend.enqueues) == {"text_encoder", "backbone"}


def test_graphs_are_bounded(on_device):
    pipe = on_device(max_plans=2)
    for width in (16, 32, 48, 16):
        draw(pipe, width=width)
        draw(pipe, width=width)
        assert len(pipe.backend.denoiser._plans) <= 2
    assert pipe.backend.device.captures == 4
    assert pipe.backend.open_contexts == 2 * 2 + 2  # conditioner and backbone of two plans, and the text encoders'


def test_warm_up_makes_the_graph(on_device):
    pipe = on_device()
    pipe.warm_up([(1, 32, 48), (2, 32, 32)], text_tokens=16)
    device = pipe.backend.device
    assert device.captures == 2
    launches = device.launches
    draw(pipe, output_type="pil")
    assert (device.captures, device.launches) == (2, launches + 1)
    with pytest.raises(RequestError, match=r"^height must be a multiple of 16, got 33"):
        pipe.warm_up([(1, 33, 48)])


def test_warm_up_on_a_cpu_checks_only(plain):
    plain["flux"].warm_up([(1, 32, 32)])
    with pytest.raises(RequestError, match=r"^width must be a multiple of 16"):
        plain["flux"].warm_up([(1, 32, 33)])


def test_the_workspace_grows_and_graphs_follow(on_device, plain):
    pipe = on_device()
    for width in (16, 16, 64, 64, 16, 16):
        np.testing.assert_allclose(draw(pipe, width=width), draw(plain["flux"], width=width), **CLOSE)
    # the first shape's graph held the smaller workspace, and was made again
    assert pipe.backend.device.captures == 3
    for width in (64, 16):
        draw(pipe, width=width)
    assert pipe.backend.device.captures == 3


@pytest.mark.parametrize("why", ["obstacle", "refused", "failing"])
def test_what_cannot_be_captured_is_enqueued_and_logged_once(why, on_device, plain, caplog, monkeypatch):
    pipe = on_device()
    said = {
        "obstacle": "backbone: its weights are streamed",
        "refused": "the capture failed: the stream cannot capture",
    }
    if why == "obstacle":
        pipe.backend.obstacles["backbone"] = "its weights are streamed"
    elif why == "refused":
        pipe.backend.device.refuse_capture = True
    else:
        inner = HostContext.enqueue

        def failing(self, addresses, stream):
            if stream.device.capturing:
                raise EngineError("backbone: the run failed")
            inner(self, addresses, stream)

        monkeypatch.setattr(HostContext, "enqueue", failing)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(draw(pipe), draw(plain["flux"]), **CLOSE)
    text = f"images are generated without a CUDA graph: {said.get(why, 'the capture failed: backbone: the run failed')}"
    assert [r.message for r in caplog.records] == [text]
    assert (pipe.backend.device.captures, pipe.backend.device.launches) == (0, 0)


def test_low_memory_has_one_part_at_a_time_and_keeps_nothing(on_device, plain):
    pipe = on_device(memory="low")
    for _ in range(2):
        found = draw(pipe, output_type="pil")
        assert np.abs(pixels(found) - pixels(draw(plain["flux"], output_type="pil"))).max() <= 1
        assert pipe.backend.opened == set()
    parts = ["backbone", "vae_decoder"]  # texts and modulation were cached for the second image
    assert pipe.backend.opens == ["text_encoder", "text_encoder_2", "conditioner", *parts, *parts]
    assert pipe.backend.most_open == 1
    assert pipe.backend.device.captures == 0


def test_callbacks_see_every_step(on_device, plain):
    for memory in MODES:
        pipe = on_device(memory=memory)
        seen, expected = {}, {}
        last = draw(pipe, [*PROMPTS], callback_on_step_end=seen.__setitem__)
        draw(plain["flux"], [*PROMPTS], callback_on_step_end=expected.__setitem__)
        assert list(seen) == [0, 1]
        for step, latents in seen.items():
            np.testing.assert_allclose(latents, expected[step], **CLOSE)
        np.testing.assert_array_equal(seen[1], last)


def test_callbacks_wait_for_every_group(on_device, plain):
    pipe = on_device("qwen")
    seen, expected = [], []
    prompts, whole = ["aa", "bbbb", "cc"], {"max_sequence_length": 256}
    draw(pipe, prompts, **whole, callback_on_step_end=lambda i, x: seen.append(x.copy()))
    draw(plain["qwen"], prompts, **whole, callback_on_step_end=lambda i, x: expected.append(x.copy()))
    np.testing.assert_allclose(seen, expected, **CLOSE)


def test_batches_are_cut_to_what_the_engines_take(on_device, plain):
    pipe = on_device()
    pipe.backend.limits = lambda part, shapes: (
        f"{part}: too many" if part == "backbone" and shapes["latents"][0] > 2 else None
    )
    seen = []
    found = draw(pipe, num_images_per_prompt=5, callback_on_step_end=lambda i, x: seen.append(x.copy()))
    np.testing.assert_allclose(found, draw(plain["flux"], num_images_per_prompt=5), **CLOSE)
    np.testing.assert_array_equal(seen[-1], found)
    batches = [i["latents"][0] for p, i in pipe.backend.contexts if p == "backbone"]
    assert batches == [2, 1]
    pipe.backend.limits = lambda part, shapes: f"{part}: no" if part == "backbone" else None
    with pytest.raises(EngineError, match=r"^backbone: no$"):
        draw(pipe)


def test_schedules_longer_than_the_conditioner_takes(on_device, plain):
    pipe = on_device()
    pipe.backend.limits = lambda part, shapes: (
        "too many steps" if part == "conditioner" and shapes["timesteps"][0] > 3 else None
    )
    found = draw(pipe, num_inference_steps=7)
    np.testing.assert_allclose(found, draw(plain["flux"], num_inference_steps=7), **CLOSE)
    assert pipe.backend.enqueues.count("conditioner") == 3  # steps 0-2, 3-5 and 4-6


def test_threads(on_device, plain):
    pipe = on_device("qwen")
    wanted = {(p, s): draw(plain["qwen"], p, seed=s) for p in PROMPTS for s in range(4)}
    barrier = threading.Barrier(8)

    def work(case):
        barrier.wait()
        return [draw(pipe, case[0], seed=case[1]) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for case, found in zip(wanted, pool.map(work, wanted), strict=True):
            for x in found:
                np.testing.assert_allclose(x, wanted[case], **CLOSE)
    assert len(pipe.backend.device.threads) >= 8


def test_two_hundred_pictures_of_eight_threads(on_device):
    """A replay gives the same bits whatever other threads ran before it."""
    pipe = on_device()
    size = {"width": 16, "height": 16, "max_sequence_length": 4}
    alone = {(p, s): draw(pipe, p, seed=s, **size) for p in PROMPTS for s in range(5)}
    cases = list(alone) * 20
    with ThreadPoolExecutor(8) as pool:
        for case, found in zip(cases, pool.map(lambda c: draw(pipe, c[0], seed=c[1], **size), cases), strict=True):
            np.testing.assert_array_equal(found, alone[case])
    assert pipe.backend.device.captures == 1


def test_threads_with_low_memory(on_device, plain):
    pipe = on_device(memory="low")
    wanted = {(p, s): draw(plain["flux"], p, seed=s) for p in PROMPTS for s in range(2)}
    with ThreadPoolExecutor(4) as pool:
        for case, found in zip(wanted, pool.map(lambda c: draw(pipe, c[0], seed=c[1]), wanted), strict=True):
            np.testing.assert_allclose(found, wanted[case], **CLOSE)
    assert pipe.backend.most_open == 1


def test_closing_while_busy_waits_or_refuses(on_device):
    pipe = on_device()
    draw(pipe)
    refused = []

    def work(seed):
        try:
            return draw(pipe, seed=seed)
        except EngineError as e:
            refused.append(str(e))

    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(work, seed) for seed in range(12)]
        pending[1].result()
        pipe.close()
        for p in pending:
            p.result()
    assert all("closed" in text for text in refused)
    with pytest.raises(EngineError, match=r"^this pipeline is closed; load it again with Pipeline\.load$"):
        draw(pipe)


def test_out_of_memory_names_what_it_was_for(on_device):
    pipe = on_device()
    pipe.backend.workspace_bytes = lambda part, inputs: 1 << 30 if part == "backbone" else 0
    pipe.backend.device.capacity = 1 << 29
    with pytest.raises(
        EngineError,
        match=r"^backbone: activations need 1,073,741,824 bytes of Host 1's memory, [0-9,]+ are free; "
        r"load with memory='balanced' or 'low' \(--memory\), or generate fewer or smaller images at once$",
    ):
        draw(pipe)
    pipe.backend.workspace_bytes = lambda part, inputs: 0
    draw(pipe)


def test_other_shapes_make_room(on_device, caplog):
    pipe = on_device()
    draw(pipe, width=64)
    device = pipe.backend.device
    device.capacity = device.used_bytes()
    with caplog.at_level(logging.WARNING, "arcflow"):
        draw(pipe, width=32)
    assert [r.message for r in caplog.records] == ["out of GPU memory: the CUDA graphs of 1 other shapes are dropped"]


def test_stages_are_timed(on_device):
    pipe = on_device()
    for _ in range(3):
        times = pipe("x", height=32, width=32, max_sequence_length=16).timings_ms
    stages = ("tokenize", "encode", "noise", "rotary", "stage", "copy", "condition", "backbone", "update", "decode")
    assert set(times) == {*stages, "total"}
    assert all(times[s] > 0 for s in stages)


def test_nan_is_refused(on_device, monkeypatch):
    pipe = on_device()
    monkeypatch.setattr("host_device.randn", lambda seed, shape: np.full(shape, np.nan, "f4"))
    with pytest.raises(EngineError, match=r"^backbone: latents of images \[0\] must be finite, got NaN or Inf"):
        draw(pipe, output_type="pil")


def test_a_device_of_another_capacity_is_not_needed_for_small_pictures(on_device):
    pipe = on_device(device=HostDevice(capacity=1 << 26))
    draw(pipe, width=16, height=16)
