"""LoRAs from the GPU runtime on the driver made of host memory: what is captured, copied and allocated for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.lora_slots import write_lora

# Two runs of one float32 graph with another batch differ in summation order: a few units of 2^-24 per layer.
CLOSE = {"rtol": 0, "atol": 2e-5}


def generate(pipe, loras=None, **arguments):
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe("a red circle", **(defaults | arguments), loras=loras).images


@pytest.fixture
def pipes(on_gpu, plain, tmp_path):
    """A pipeline on the driver and one on the CPU, both with two LoRAs of rank 4 and one of rank 12."""

    def get(name, **arguments):
        pipe, cpu = on_gpu(name, **arguments), plain[name]
        for lora in cpu.loras:
            cpu.unload_lora(lora)
        for lora, rank in (("a", 4), ("b", 4), ("wide", 12)):
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
