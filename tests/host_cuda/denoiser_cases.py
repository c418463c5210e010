"""The denoiser on the driver made of host memory: its plans and graphs, the order of its work, memory and threads."""

from __future__ import annotations

import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import EngineError, RequestError
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.gpu.cuda import open_device
from arcflow_runtime.gpu.lane import Lane, OutOfDeviceMemory
from tests.host_cuda.checked import ok
from tests.host_cuda.images import CLOSE, PROMPTS, WITHOUT_GRAPH, generate, levels


def captures(driver):
    return driver.calls("cuStreamBeginCapture")


def launches(driver):
    return driver.calls("cuGraphLaunch")


def inputs_of(pipe, part):
    """The input shapes of every context that was made for a part."""
    return [inputs for name, inputs in pipe.backend.contexts if name == part]


# What a plan is made for


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
def test_modulation_by_way_of_the_host(memory, on_gpu, plain, driver, monkeypatch):
    """This is how a conditioner runs whose dtype differs from the backbone's."""
    monkeypatch.setattr("arcflow_runtime.gpu.denoiser.DeviceDenoiser._modulation_source", lambda self, job: "given")
    pipe = on_gpu(memory=memory)
    for prompt in (*PROMPTS, PROMPTS[0]):
        np.testing.assert_allclose(generate(pipe, prompt), generate(plain["flux"], prompt), **CLOSE)
    assert captures(driver) == (0 if memory == "low" else 1)


def test_images_of_every_kind(on_gpu, plain, driver):
    pipe = on_gpu()
    for kind in ("pil", "numpy", "latents"):
        for _ in range(2):
            found = generate(pipe, output_type=kind, num_images_per_prompt=2)
            expected = generate(plain["flux"], output_type=kind, num_images_per_prompt=2)
            if kind == "pil":
                # A value next to a rounding boundary may differ by one level.
                assert np.abs(levels(found) - levels(expected)).max() <= 1
            else:
                # Half a level more, because the float image is made from rounded levels.
                bound = {"rtol": 0, "atol": 1.5 / 255} if kind == "numpy" else CLOSE
                np.testing.assert_allclose(found, expected, **bound)
    assert captures(driver) == 2, "'pil' and 'numpy' need the same work"


def test_prompts_are_grouped_by_length(on_gpu, plain, driver):
    pipe = on_gpu("qwen")
    prompts, whole = ["aa", "bbbb", "aa", "cc"], {"max_sequence_length": 256}
    for _ in range(2):
        np.testing.assert_allclose(generate(pipe, prompts, **whole), generate(plain["qwen"], prompts, **whole), **CLOSE)
    shapes = {inputs["encoder_hidden_states"] for inputs in inputs_of(pipe, "backbone")}
    assert sorted(shape[0] for shape in shapes) == [1, 3]
    assert captures(driver) == 2


def test_what_a_new_text_length_costs(on_gpu, driver):
    """docs/engines.md gives these numbers."""
    pipe = on_gpu("qwen")
    request = {"output_type": "pil", "max_sequence_length": 256}
    generate(pipe, "a b c d e f", **request)  # the workspace is large enough for what follows
    driver.reset()
    before = len(pipe.backend.contexts)
    generate(pipe, "a b c", **request)
    made = [part for part, _ in pipe.backend.contexts[before:]]
    assert sorted(made) == ["backbone", "text_encoder", "vae_decoder"]
    # Also one each for the text encoder, and one in page-locked memory for the constants, which is freed at once.
    assert (driver.calls("cuMemAlloc"), driver.calls("cuMemHostAlloc")) == (3 + 1, 2 + 1 + 1)
    assert (driver.calls("cuMemFreeHost"), captures(driver), launches(driver)) == (1, 0, 0)


def test_a_bundle_with_a_modulation_table_has_no_conditioner(on_gpu):
    pipe = on_gpu("qwen")
    for _ in range(2):
        generate(pipe)
    assert "conditioner" not in pipe.backend.opens
    assert set(pipe.backend.enqueues) == {"text_encoder", "backbone"}


@pytest.mark.slow
def test_float16_has_an_input_of_its_own(on_gpu):
    pipe = on_gpu("float16")
    generate(pipe)
    (plan,) = pipe.backend.denoiser._plans.values()
    assert "input" in plan.buffers


def test_plans_are_bounded(on_gpu, driver):
    pipe = on_gpu(max_plans=2)
    for width in (16, 32, 48, 16):
        for _ in range(2):
            generate(pipe, width=width)
        assert len(pipe.backend.denoiser._plans) <= 2
    assert captures(driver) == 4
    # Conditioner and backbone of two plans, and two text encoders.
    assert len(pipe.backend.open_contexts) == 2 * 2 + 2


def test_warm_up_makes_the_graph(on_gpu, driver):
    pipe = on_gpu()
    pipe.warm_up([(1, 32, 48), (2, 32, 32)], text_tokens=16)
    assert captures(driver) == 2
    before = launches(driver)
    generate(pipe, output_type="pil")
    assert (captures(driver), launches(driver)) == (2, before + 1)
    with pytest.raises(RequestError, match=r"^height must be a multiple of 16, got 33"):
        pipe.warm_up([(1, 33, 48)])


def test_every_plan_that_was_warmed_up_is_kept(on_gpu, driver):
    pipe = on_gpu(max_plans=2)
    warm, others = (16, 32, 48), (64, 80, 96)
    for _ in range(2):
        pipe.warm_up([(1, 32, width) for width in warm], text_tokens=16)
        assert captures(driver) == len(warm)
    for width in (*warm, *others[:2], *warm):
        generate(pipe, width=width)
    assert captures(driver) == len(warm)
    for width in others * 2:
        generate(pipe, width=width)
        assert len(pipe.backend.denoiser._plans) <= len(warm) + 2


def test_warm_up_on_a_cpu_only_checks(plain):
    plain["flux"].warm_up([(1, 32, 32)])
    with pytest.raises(RequestError, match=r"^width must be a multiple of 16"):
        plain["flux"].warm_up([(1, 32, 33)])


def test_graphs_follow_the_workspace(on_gpu, plain, driver):
    pipe = on_gpu()
    for width in (16, 16, 64, 64, 16, 16):
        np.testing.assert_allclose(generate(pipe, width=width), generate(plain["flux"], width=width), **CLOSE)
    # The first shape's graph had the smaller workspace, so it was made again.
    assert captures(driver) == 3
    for width in (64, 16):
        generate(pipe, width=width)
    assert captures(driver) == 3


# Captures that fail; image_cases.py has those that the driver refuses


def test_a_part_that_cannot_be_captured(on_gpu, plain, driver, caplog):
    pipe = on_gpu()
    pipe.backend.obstacles["backbone"] = "its weights are streamed"
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(generate(pipe), generate(plain["flux"]), **CLOSE)
    assert [r.message for r in caplog.records] == [f"{WITHOUT_GRAPH}backbone: its weights are streamed"]
    assert (captures(driver), launches(driver)) == (0, 0)


@pytest.mark.parametrize("after", [0, 1])
def test_an_engine_that_fails_in_a_capture(after, on_gpu, plain, driver, caplog):
    """It fails at its first run in the capture, or half-way at its second."""
    pipe = on_gpu()
    runs = []

    def fail_in_a_capture(part, stream):
        if part == "backbone" and int(ok(cuda.cuStreamIsCapturing(stream.handle))):
            runs.append(part)
            if len(runs) > after:
                raise EngineError("backbone: the run failed")

    pipe.backend.before_enqueue = fail_in_a_capture
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(generate(pipe), generate(plain["flux"]), **CLOSE)
    assert [r.message for r in caplog.records] == [f"{WITHOUT_GRAPH}the capture failed: backbone: the run failed"]
    assert (captures(driver), launches(driver)) == (1, 0)


# Parts that do not stay loaded


def test_low_memory_has_one_part_at_a_time(on_gpu, plain, driver):
    pipe = on_gpu(memory="low")
    for _ in range(2):
        found = levels(generate(pipe, output_type="pil"))
        assert np.abs(found - levels(generate(plain["flux"], output_type="pil"))).max() <= 1
        assert pipe.backend.opened == set()
    parts = ["backbone", "vae_decoder"]  # text states and modulation were cached for the second image
    assert pipe.backend.opens == ["text_encoder", "text_encoder_2", "conditioner", *parts, *parts]
    assert pipe.backend.most_open == 1
    assert captures(driver) == 0


@pytest.mark.slow
def test_threads_with_low_memory(on_gpu, plain):
    pipe = on_gpu(memory="low")
    cases = [(prompt, seed) for prompt in PROMPTS for seed in range(2)]
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda case: generate(pipe, case[0], seed=case[1]), cases)
        for (prompt, seed), found in zip(cases, made, strict=True):
            np.testing.assert_allclose(found, generate(plain["flux"], prompt, seed=seed), **CLOSE)
    assert pipe.backend.most_open == 1


# Callbacks, and requests that are larger than the engines take


def test_a_callback_sees_every_step(on_gpu, plain):
    expected = {}
    generate(plain["flux"], [*PROMPTS], callback_on_step_end=expected.__setitem__)
    for memory in MODES:
        pipe, seen = on_gpu(memory=memory), {}
        last = generate(pipe, [*PROMPTS], callback_on_step_end=seen.__setitem__)
        assert list(seen) == [0, 1]
        for step, latents in seen.items():
            np.testing.assert_allclose(latents, expected[step], **CLOSE)
        np.testing.assert_array_equal(seen[1], last)


def test_a_callback_waits_for_every_group(on_gpu, plain):
    pipe = on_gpu("qwen")
    prompts, whole = ["aa", "bbbb", "cc"], {"max_sequence_length": 256}
    seen, expected = [], []
    for target, steps in ((pipe, seen), (plain["qwen"], expected)):
        generate(target, prompts, **whole, callback_on_step_end=lambda i, x, steps=steps: steps.append(x.copy()))
    np.testing.assert_allclose(seen, expected, **CLOSE)


def test_batches_are_cut_to_what_the_engines_take(on_gpu, plain):
    pipe, seen = on_gpu(), []
    pipe.backend.limits = lambda part, shapes: (
        f"{part}: too many" if part == "backbone" and shapes["latents"][0] > 2 else None
    )
    found = generate(pipe, num_images_per_prompt=5, callback_on_step_end=lambda i, x: seen.append(x.copy()))
    np.testing.assert_allclose(found, generate(plain["flux"], num_images_per_prompt=5), **CLOSE)
    np.testing.assert_array_equal(seen[-1], found)
    assert [inputs["latents"][0] for inputs in inputs_of(pipe, "backbone")] == [2, 1]
    pipe.backend.limits = lambda part, shapes: f"{part}: no" if part == "backbone" else None
    with pytest.raises(EngineError, match=r"^backbone: no$"):
        generate(pipe)


def test_schedules_are_cut_to_what_the_conditioner_takes(on_gpu, plain):
    pipe = on_gpu()
    pipe.backend.limits = lambda part, shapes: (
        "too many steps" if part == "conditioner" and shapes["timesteps"][0] > 3 else None
    )
    found = generate(pipe, num_inference_steps=7)
    np.testing.assert_allclose(found, generate(plain["flux"], num_inference_steps=7), **CLOSE)
    assert pipe.backend.enqueues.count("conditioner") == 3  # steps 0-2, 3-5 and 4-6


# Threads


@pytest.mark.slow
def test_threads_that_start_together(on_gpu, plain):
    pipe = on_gpu("qwen")
    expected = {(p, s): generate(plain["qwen"], p, seed=s) for p in PROMPTS for s in range(4)}
    barrier = threading.Barrier(8)

    def work(case):
        barrier.wait()
        return [generate(pipe, case[0], seed=case[1]) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for case, found in zip(expected, pool.map(work, expected), strict=True):
            for images in found:
                np.testing.assert_allclose(images, expected[case], **CLOSE)


@pytest.mark.slow
def test_threads_share_one_graph(on_gpu, driver):
    """A replay gives the same bits whatever other threads ran before it."""
    pipe = on_gpu()
    size = {"width": 16, "height": 16, "max_sequence_length": 4}
    alone = {(p, s): generate(pipe, p, seed=s, **size) for p in PROMPTS for s in range(5)}
    cases = list(alone) * 20
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda case: generate(pipe, case[0], seed=case[1], **size), cases)
        for case, found in zip(cases, made, strict=True):
            np.testing.assert_array_equal(found, alone[case])
    assert captures(driver) == 1


def test_closing_while_busy_waits_or_refuses(on_gpu):
    pipe = on_gpu()
    generate(pipe)
    refused = []

    def work(seed):
        try:
            return generate(pipe, seed=seed)
        except EngineError as e:
            refused.append(str(e))

    with ThreadPoolExecutor(4) as pool:
        pending = [pool.submit(work, seed) for seed in range(12)]
        pending[1].result()
        pipe.close()
        for each in pending:
            each.result()
    assert all("closed" in text for text in refused)
    with pytest.raises(EngineError, match=r"^this pipeline is closed; load it again with Pipeline\.load$"):
        generate(pipe)


# Memory


def test_out_of_memory_says_what_it_was_for(on_gpu, driver):
    pipe = on_gpu()
    pipe.backend.workspace_bytes = lambda part, inputs: 1 << 30 if part == "backbone" else 0
    driver.set_memory(1 << 29)
    with pytest.raises(
        EngineError,
        match=r"^backbone: activations need 1,073,741,824 bytes of Host memory's memory, [0-9,]+ are free; "
        r"load with memory='balanced' or 'low' \(--memory\), or generate fewer or smaller images at once$",
    ):
        generate(pipe)
    pipe.backend.workspace_bytes = lambda part, inputs: 0
    generate(pipe)


def test_a_second_try_has_what_the_first_one_freed(driver):
    lane, first = Lane(open_device()), []
    lane.make_room = lambda: True

    def work():
        loaded = Lane(lane.device)
        if not first:
            first.append(weakref.ref(loaded))
            raise OutOfDeviceMemory("full")
        return first[0]() is None

    assert lane.with_room(work)


def test_small_images_need_little_memory(on_gpu, driver):
    driver.set_memory(64 << 20)
    generate(on_gpu(), width=16, height=16)


# Results


def test_stages_are_timed(on_gpu):
    pipe = on_gpu()
    for _ in range(3):
        times = pipe("x", height=32, width=32, max_sequence_length=16).timings_ms
    stages = ("tokenize", "encode", "noise", "rotary", "stage", "copy", "condition", "backbone", "update", "decode")
    assert set(times) == {*stages, "total"}
    assert all(times[stage] > 0 for stage in stages)


def test_nan_is_refused(on_gpu, monkeypatch):
    pipe = on_gpu()
    monkeypatch.setattr("arcflow_runtime.generate.inputs.sigmas", lambda steps, *_: np.full(steps + 1, np.nan))
    with pytest.raises(EngineError, match=r"^backbone: latents of images \[0\] must be finite, got NaN or Inf"):
        generate(pipe, output_type="pil")
