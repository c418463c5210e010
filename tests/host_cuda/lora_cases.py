"""LoRAs from the GPU runtime on the driver made of host memory: what is captured, copied and allocated for them."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import EngineError, RequestError
from arcflow_runtime.gpu.loras import LoraArenas, pad_inputs
from arcflow_runtime.lora.prepare import NO_LORAS
from tests.host_cuda.control import Live
from tests.lora_slots import write_lora

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}


def generate(pipe, loras=None, **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe("a red circle", **(defaults | arguments), loras=loras).images


@pytest.fixture
def pipes(on_gpu, plain, tmp_path):
    """A pipeline on the driver and one on the CPU, both with two LoRAs of rank 4, and one of rank 12 and 30."""

    def get(name, **arguments):
        pipe, cpu = on_gpu(name, **arguments), plain[name]
        for lora in cpu.loras:
            cpu.unload_lora(lora)
        for lora, rank in (("a", 4), ("b", 4), ("wide", 12), ("widest", 30)):
            path = write_lora(tmp_path / f"{lora}.safetensors", pipe.bundle.manifest.slots(), rank, ord(lora[0]))
            pipe.load_lora(path)
            cpu.load_lora(path)
        return pipe, cpu

    return get


@pytest.mark.parametrize("name", ["slots", "qwen slots"])
def test_images_are_those_of_the_cpu(name, pipes):
    pipe, cpu = pipes(name)
    for loras in ({}, {"a": 1}, {"b": 0.5}, {"a": 1}, {"wide": 1}, {"a": 0.5, "b": 0.5}, {}, {"wide": -1}, {"a": 1}):
        np.testing.assert_allclose(generate(pipe, loras), generate(cpu, loras), **CLOSE)


def test_a_switch_is_one_copy_before_the_launch(pipes, driver):
    pipe, _ = pipes("slots")
    sets = ({"a": 0.8}, {"b": -0.5})
    images = [generate(pipe, loras) for loras in (*sets, *sets)][2:]
    driver.reset()
    for i, expected in ((0, 1), (1, 1), (1, 0)):
        before = driver.calls("cuMemcpyAsync")
        np.testing.assert_array_equal(generate(pipe, sets[i]), images[i])
        assert driver.calls("cuMemcpyAsync") - before == expected
    assert (driver.calls("cuGraphLaunch"), driver.calls("cuStreamBeginCapture")) == (3, 0)
    assert not [call for call in driver.log() if "Alloc" in call]


def test_low_memory(pipes):
    pipe, cpu = pipes("slots", memory="low")
    for loras in ({"a": 1}, {}, {"wide": 0.5}):
        np.testing.assert_allclose(generate(pipe, loras), generate(cpu, loras), **CLOSE)


@pytest.mark.slow
def test_threads_with_sets_of_their_own(pipes):
    pipe, cpu = pipes("slots")
    sets = [{}, {"a": 1}, {"b": 1}, {"wide": 1}, {"a": 0.5, "b": 0.5}, {"a": -1}, {"b": 0.2}, {"a": 1, "wide": 1}]
    expected = [generate(cpu, loras) for loras in sets]
    with ThreadPoolExecutor(8) as pool:
        for image, right in zip(pool.map(lambda loras: generate(pipe, loras), sets * 3), expected * 3, strict=True):
            np.testing.assert_allclose(image, right, **CLOSE)


def test_requests_without_a_lora_have_the_smallest_rank(pipes):
    pipe, _ = pipes("slots")
    for loras, groups in ({}, 1), ({"widest": 1}, 4):
        generate(pipe, loras)
        backbone = dict(pipe.backend.contexts)["backbone"]
        assert {shape[1] for name, shape in backbone.items() if name.endswith(".lora_a")} == {groups}


def test_warm_up_captures_a_graph_for_each_rank(pipes, driver):
    pipe, cpu = pipes("slots")
    pipe.warm_up([(1, 32, 48)], text_tokens=16, lora_ranks=(16, 32))
    assert driver.calls("cuStreamBeginCapture") == 3
    for loras in ({}, {"wide": 0.5}, {"widest": 1}):
        np.testing.assert_allclose(generate(pipe, loras), generate(cpu, loras), **CLOSE)
    assert driver.calls("cuStreamBeginCapture") == 3
    with pytest.raises(RequestError, match=r"^lora_ranks must be between 1 and 32 for this bundle, got 40$"):
        pipe.warm_up([(1, 32, 48)], lora_ranks=(40,))


def test_kept_sets_are_bounded(pipes, driver):
    pipe, _ = pipes("slots")
    manifest, lane = pipe.bundle.manifest, pipe.backend.lane
    before = driver.live(Live.DEVICE_BYTES)
    with lane.enter() as stream:
        arenas = LoraArenas(lane, manifest, ("backbone",), sets=2)
        used = []
        for scale in (1.0, 2.0, 3.0, 1.0, 0.0):
            loras = pipe._loras.get((("a", scale),)) if scale else NO_LORAS
            assert arenas.rank(loras) == 8
            arenas.put(loras, 8, stream)
            stream.wait()
            used.append(driver.live(Live.DEVICE_BYTES) - before)
            name, address = next(iter(arenas.addresses("backbone", 8).items()))
            wanted = pad_inputs(manifest.parts["backbone"].lora, loras.of("backbone"))[name]
            found = ctypes.string_at(driver.at(address, wanted.nbytes), wanted.nbytes)
            assert found == wanted.tobytes()
        # An arena and one, then two sets; never a third.
        assert [u // (used[0] // 2) for u in used] == [2, 3, 3, 3, 3]
        arenas.release()
    assert driver.live(Live.DEVICE_BYTES) == before


def test_too_little_memory_is_an_error_that_says_what_for(pipes, driver):
    pipe, cpu = pipes("slots")
    generate(pipe)
    _, free, total = cuda.cuMemGetInfo()
    driver.set_memory(total - free + 4096)
    with pytest.raises(EngineError, match=r"^LoRAs of rank 32 need [\d,]+ bytes of "):
        generate(pipe, {"widest": 1})
    driver.set_memory(total)
    np.testing.assert_allclose(generate(pipe, {"a": 1}), generate(cpu, {"a": 1}), **CLOSE)
