"""LoRAs from the GPU runtime on the driver made of host memory: what is captured, copied and allocated for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from arcflow_runtime import EngineError, RequestError
from tests.host_cuda.control import Live
from tests.lora_slots import write_lora

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}


def generate(pipe, loras=None, **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe("a red circle", **(defaults | arguments), loras=loras).images


@pytest.fixture
def pipes(on_gpu, plain, tmp_path):
    """A pipeline on the driver and one on the CPU, both with two LoRAs of rank 4, and two of 12: one not of CLIP."""

    def get(name, **arguments):
        pipe, cpu = on_gpu(name, **arguments), plain[name]
        for lora in cpu.loras:
            cpu.unload_lora(lora)
        slots = pipe.bundle.manifest.slots()
        for lora, rank, only in (("a", 4, ""), ("b", 4, ""), ("wide", 12, ""), ("image", 12, "transformer_blocks")):
            path = write_lora(tmp_path / f"{lora}.safetensors", slots, rank, ord(lora[0]), only)
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
    pipe, cpu = pipes("slots", low_memory=True)
    for loras in ({"a": 1}, {}, {"wide": 0.5}):
        np.testing.assert_allclose(generate(pipe, loras), generate(cpu, loras), **CLOSE)


def test_threads_with_sets_of_their_own(pipes):
    pipe, cpu = pipes("slots")
    sets = [{}, {"a": 1}, {"b": 1}, {"wide": 1}, {"a": 0.5, "b": 0.5}, {"a": -1}, {"b": 0.2}, {"a": 1, "wide": 1}]
    expected = [generate(cpu, loras) for loras in sets]
    with ThreadPoolExecutor(8) as pool:
        for image, right in zip(pool.map(lambda loras: generate(pipe, loras), sets * 3), expected * 3, strict=True):
            np.testing.assert_allclose(image, right, **CLOSE)


def test_each_rank_has_a_graph_that_warm_up_captures(pipes, driver):
    pipe, _ = pipes("slots")
    generate(pipe, {"wide": 1}, output_type="pil")  # the text encoders' workspace is the largest
    driver.reset()
    pipe.warm_up([(1, 32, 48)], text_tokens=16, lora_ranks=(16,))
    assert sorted(key.lora_rank for key in pipe._denoiser._plans) == [8, 16]
    assert driver.calls("cuStreamBeginCapture") == 2
    for loras in ({}, {"a": 1}, {"wide": 1}):  # of rank 0, 4 and 12
        generate(pipe, loras, output_type="pil")
    assert driver.calls("cuStreamBeginCapture") == 2
    with pytest.raises(RequestError, match=r"^lora_ranks must be between 1 and 32 for this bundle, got 40$"):
        pipe.warm_up([(1, 32, 48)], lora_ranks=(40,))


def test_sets_on_the_device_are_bounded(pipes, driver):
    pipe, _ = pipes("slots")
    pipe._denoiser._arenas._limits = (2, 1 << 40)
    used, images = [], []
    for scale in (0.25, 0.5, 0.75, 1, 0.25):
        images.append(generate(pipe, {"a": scale}))
        used.append(driver.live(Live.DEVICE_BYTES))
    np.testing.assert_array_equal(images[0], images[-1])
    assert used[1] > used[0] and used[1:] == [used[1]] * 4


def test_too_little_memory_is_an_error_that_says_what_for(pipes, driver):
    pipe, cpu = pipes("slots")
    generate(pipe)
    driver.set_memory(driver.live(Live.DEVICE_BYTES) + 4096)
    with pytest.raises(EngineError, match=r"^LoRAs of rank 16 need [\d,]+ bytes of .*'s memory, "):
        generate(pipe, {"image": 1})
    driver.set_memory(8 << 30)
    np.testing.assert_allclose(generate(pipe, {"image": 1}), generate(cpu, {"image": 1}), **CLOSE)
