"""TensorRT engines on the driver made of host memory: streamed weights, and memory that runs out."""

from __future__ import annotations

import itertools
import logging
import re

import numpy as np
import pytest

from arcflow_runtime import EngineError
from arcflow_runtime.gpu.lane import OutOfDeviceMemory
from arcflow_runtime.gpu.tensorrt import RESERVE_BYTES
from tests.host_cuda import tensorrt_bindings as bindings
from tests.host_cuda.control import Code
from tests.host_cuda.images import CLOSE, WITHOUT_GRAPH
from tests.host_cuda.tensorrt_engines import PROMPT, SIZE, build, expected

# Weight streaming

STREAMED = ("WEIGHT_STREAMING",)


def weights_of(bundle, *parts):
    """Bytes of the weights files of these parts, or of all."""
    m = bundle.manifest
    return sum(m.files[m.parts[part].weights].bytes for part in parts or m.parts)


def test_a_budget_of_more_than_31_bits(root, pipeline, driver):
    """The binding of the automatic budget returns 32 bits, so that 9.8 GB become 1.2 GB and 6.5 GB become -2.1 GB."""
    build(root, flags=STREAMED)
    bindings.state.streamable = 9_800_000_000
    driver.set_memory(30 << 30)
    bundle = pipeline(root).bundle
    reserve = (1 << 16) + 9_800_000_000 // 16 + RESERVE_BYTES  # activations, and the buffer to stream through
    free, left = (30 << 30) - reserve, weights_of(bundle)
    budgets = dict(set_budgets())
    assert list(budgets) == list(bundle.manifest.parts)
    for part, budget in budgets.items():
        # The stand-in allocates nothing for weights of this size, so all parts see the same free memory.
        assert budget == min(9_800_000_000, free * weights_of(bundle, part) // left), part
        left -= weights_of(bundle, part)
    assert max(budgets.values()) > 1 << 32


def set_budgets():
    """(part, budget) for each engine: the last that was set."""
    return list(dict(bindings.state.budgets).items())


@pytest.mark.parametrize("nbytes", [0, 1 << 20, RESERVE_BYTES])
def test_the_smallest_budget_streams_everything(nbytes, root, pipeline, driver):
    build(root, flags=STREAMED)
    bindings.state.streamable = 9_800_000_000
    driver.set_memory(nbytes)
    pipeline(root)
    assert [budget for _, budget in set_budgets()] == [0] * 5


def test_weights_that_fit_are_not_streamed(root, pipeline, driver, caplog):
    build(root, flags=STREAMED)
    pipe = pipeline(root)
    graphs = {part: (root / spec.graph).stat().st_size for part, spec in pipe.bundle.manifest.parts.items()}
    assert dict(set_budgets()) == graphs, "the stand-in takes the size of the graph for that of the weights"
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    assert (driver.calls("cuGraphLaunch"), caplog.records) == (2, [])


def test_streamed_weights_are_not_captured(root, pipeline, driver, caplog):
    build(root, flags=STREAMED)
    bindings.state.streamable = 9_800_000_000
    driver.set_memory(4 << 30)
    pipe = pipeline(root)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, expected(root), **CLOSE)
    text = f"{WITHOUT_GRAPH}backbone: its weights are streamed from the host"
    assert [r.message for r in caplog.records] == [text]
    assert driver.calls("cuGraphLaunch") == 0


def test_a_budget_that_is_not_accepted(root, pipeline, driver, monkeypatch):
    build(root, flags=STREAMED)
    driver.fail("cuMemAlloc", 1, Code.OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory, match=r"^text_encoder: weights need [0-9,]+ bytes of Host memory's memory, "):
        pipeline(root)
    ignored = property(lambda engine: -2_089_934_592, lambda engine, value: None)
    monkeypatch.setattr(bindings.ICudaEngine, "weight_streaming_budget_v2", ignored)
    text = r"^text_encoder: tensorrt-rtx: the budget for streamed weights must be [0-9,]+ bytes, got -2,089,934,592$"
    with pytest.raises(EngineError, match=text):
        pipeline(root)


# Memory that runs out inside the library

DROPPED = "out of GPU memory: the CUDA graphs of 1 other shapes are dropped"
#: What an engine that allocates when it runs takes.
RUN_BYTES = {"backbone": 4096}
#: A second plan's allocations, when the prompt is known: staged, constant and working buffers, one context each for
#: conditioner and backbone, and `RUN_BYTES` in each of two steps. The workspace is large enough.
SECOND_PLAN = 3 + 2 + 2


def test_weights_that_do_not_fit(root, pipeline, driver):
    build(root)
    driver.fail("cuMemAlloc", 1, Code.OUT_OF_MEMORY)
    text = r"^text_encoder: weights need [0-9,]+ bytes of Host memory's memory, [0-9,]+ are free; "
    with pytest.raises(OutOfDeviceMemory, match=text):
        pipeline(root)


@pytest.mark.parametrize(
    ("change", "low_memory", "allocations"),
    [
        ({"width": 16}, False, SECOND_PLAN),
        # Also the text encoder's context, and its inputs and outputs.
        ({"max_sequence_length": 32}, False, SECOND_PLAN + 2),
        # Also weights and workspace of conditioner and backbone.
        ({"width": 16}, True, SECOND_PLAN + 4),
    ],
    ids=["size", "text", "low"],
)
def test_every_allocation_of_a_second_shape_may_fail(change, low_memory, allocations, root, pipeline, driver, caplog):
    """The other shape makes room for it, in buffers, contexts, runs and loaded weights."""
    build(root)
    wanted = expected(root, **change)
    for nth in itertools.count(1):
        bindings.state.run_bytes = RUN_BYTES
        pipe = pipeline(root, low_memory=low_memory)
        pipe(PROMPT, **SIZE)
        driver.fail("cuMemAlloc", nth, Code.OUT_OF_MEMORY)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "arcflow"):
            np.testing.assert_allclose(pipe(PROMPT, **(SIZE | change)).images, wanted, **CLOSE)
        reached = driver.pending_failures() == 0
        driver.reset()
        assert [r.message for r in caplog.records] == [DROPPED] * reached
        np.testing.assert_allclose(pipe(PROMPT, **(SIZE | change)).images, wanted, **CLOSE)
        pipe.close()
        if not reached:
            break
    assert nth - 1 == allocations


@pytest.mark.parametrize(
    ("nth", "text"),
    [
        (4, "backbone: tensorrt-rtx: an execution context cannot be created"),
        (SECOND_PLAN + 1, "backbone: tensorrt-rtx: the run failed"),  # the workspace is allocated too
    ],
    ids=["context", "run"],
)
def test_without_other_shapes_it_is_an_error(nth, text, root, pipeline, driver):
    build(root)
    bindings.state.run_bytes = RUN_BYTES
    pipe = pipeline(root)
    states, pooled = (pipe.bundle.manifest.parts[p].outputs[0].shape[-1] for p in ("text_encoder_2", "text_encoder"))
    embeds = {
        "prompt_embeds": np.zeros((1, 16, states), np.float32),
        "pooled_prompt_embeds": np.zeros((1, pooled), np.float32),
    }
    driver.fail("cuMemAlloc", nth, Code.OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory) as error:
        pipe(**embeds, **SIZE)
    first, *logged = str(error.value).splitlines()
    free = r"[0-9,]+ bytes of Host memory's memory are free"
    assert re.fullmatch(
        rf"{text} for lack of memory; {free}; load with low_memory=True \(--low-memory\), "
        "or generate fewer or smaller images at once",
        first,
    ), first
    assert "out of memory" in logged[0]
    pipe(**embeds, **SIZE)


@pytest.mark.parametrize(("step", "fails"), [(0, False), (1, True)])
def test_a_step_that_a_callback_has_seen_is_not_run_again(step, fails, root, pipeline, driver):
    build(root)
    bindings.state.run_bytes = RUN_BYTES
    pipe, seen = pipeline(root), []
    pipe(PROMPT, **SIZE)
    driver.fail("cuMemAlloc", SECOND_PLAN - 1 + step, Code.OUT_OF_MEMORY)
    request = SIZE | {"width": 16, "callback_on_step_end": lambda i, latents: seen.append(i)}
    if fails:
        with pytest.raises(OutOfDeviceMemory, match=r"^backbone: tensorrt-rtx: the run failed for lack of memory; "):
            pipe(PROMPT, **request)
    else:
        pipe(PROMPT, **request)
    assert seen == ([0] if fails else [0, 1])
    driver.reset()
    np.testing.assert_allclose(pipe(PROMPT, **(SIZE | {"width": 16})).images, expected(root, width=16), **CLOSE)


def test_an_engine_that_allocates_when_it_runs_is_not_captured(root, pipeline, driver, caplog):
    build(root)
    bindings.state.run_bytes = RUN_BYTES
    pipe, wanted = pipeline(root), expected(root)
    with caplog.at_level(logging.WARNING, "arcflow"):
        for _ in range(3):
            np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, wanted, **CLOSE)
    (said,) = [r.message for r in caplog.records]
    assert said.startswith(f"{WITHOUT_GRAPH}the capture failed: backbone: tensorrt-rtx: the run failed\n"), said
    assert driver.calls("cuGraphLaunch") == 0


def test_a_launch_that_runs_out_of_memory(root, pipeline, driver, caplog):
    build(root)
    pipe, wanted = pipeline(root), expected(root)
    for width in (64, 32, 32):
        pipe(PROMPT, **(SIZE | {"width": width}))
    driver.fail("cuGraphLaunch", 1, Code.OUT_OF_MEMORY)
    with caplog.at_level(logging.WARNING, "arcflow"):
        np.testing.assert_allclose(pipe(PROMPT, **SIZE).images, wanted, **CLOSE)
    assert [r.message for r in caplog.records] == [DROPPED]
