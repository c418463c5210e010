"""LoRAs and memory modes of the C++ library on the driver made of host memory, through its C API.

As cpp_images.py, whose fixtures it uses. The counterparts in Python are lora_cases.py and memory_cases.py.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from arcflow_runtime import Bundle
from arcflow_runtime.engines.modes import MODES, TENSORRT
from arcflow_runtime.generate.memory import usual_size
from arcflow_runtime.lora.converted import write_converted
from arcflow_runtime.lora.open import open_lora
from arcflow_runtime.memory.sums import BETWEEN, ImageSize, make_sums, part_inputs
from tests.cpp import close, embed
from tests.host_cuda.control import Live
from tests.host_cuda.cpp_images import (
    CLOSE,
    GOLDEN,
    OUT_OF_MEMORY,
    PROMPTS,
    ROOTS,
    _Act,
    generate,
    library,  # noqa: F401
    on_gpu,  # noqa: F401
    plain,  # noqa: F401
)
from tests.lora_slots import write_lora

TOKENS = 64
# Slots and merged weights round differently, through about 10 layers; see CLOSE of test_lora_slots.py.
MERGED = 1e-5


@pytest.fixture
def files(tmp_path):
    """A function (bundle's name, LoRA's name, rank) -> a converted LoRA of all of the bundle's slots."""

    def get(bundle, name, rank=4):
        manifest = Bundle.open(ROOTS[bundle]).manifest
        raw = write_lora(tmp_path / f"{name}-raw.safetensors", manifest.slots(), rank, ord(name[0]))
        path = tmp_path / f"{bundle}-{name}.safetensors"
        write_converted(path, open_lora(raw, name, manifest), manifest)
        return path

    return get


@pytest.fixture
def opened(files):
    """A function (pipeline, bundle's name) -> its LoRAs: a and b of rank 4, wide of rank 12, and widest of rank 30."""
    made = []

    def get(pipe, bundle):
        ranks = {"a": 4, "b": 4, "wide": 12, "widest": 30}
        loras = {name: pipe.open_lora(files(bundle, name, rank)) for name, rank in ranks.items()}
        made.extend((pipe, lora) for lora in loras.values())
        return loras

    yield get
    for pipe, lora in made:
        pipe.close_lora(lora)


def named(loras, scales):
    return [(loras[name], scale) for name, scale in scales.items()]


# LoRAs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("name", ["slots", "qwen slots"])
def test_images_with_loras_are_those_of_the_cpu(name, memory, on_gpu, plain, opened):  # noqa: F811
    pipe, cpu = on_gpu(name, memory=memory.encode()), plain(name)
    ours, theirs = opened(pipe, name), opened(cpu, name)
    found = {}
    for scales in ({}, {"a": 1}, {"b": 0.5}, {"a": 1}, {"wide": 1}, {"a": 0.5, "b": 0.5}, {}, {"widest": -1}, {"a": 1}):
        image = generate(pipe, name.split()[0], loras=named(ours, scales)).latents
        expected = generate(cpu, name.split()[0], loras=named(theirs, scales)).latents
        np.testing.assert_allclose(image, expected, **CLOSE)
        np.testing.assert_array_equal(image, found.setdefault(str(scales), image))


@pytest.mark.slow
def test_a_golden_case_is_that_of_the_merged_export(library, on_gpu, tmp_path):  # noqa: F811
    """Plain, captured and replayed; and without the LoRA it is the reference's."""
    made = json.loads(os.environ["HOST_CUDA_MERGED"])
    case = json.loads((GOLDEN / "flux-tiny" / "cases.json").read_text())[0]
    reference = load_file(GOLDEN / "flux-tiny" / "case0.safetensors")
    given = {n: case[n] for n in ("height", "width", "max_sequence_length", "guidance_scale") if n in case}
    given |= {"prompts": [case["prompt"]], "num_inference_steps": case["nfe"], "seeds": [case["seed"]]}
    manifest = Bundle.open(ROOTS["slots"]).manifest
    path = tmp_path / "ink.safetensors"
    write_converted(path, open_lora(Path(made["lora"]), "ink", manifest), manifest)
    pipe, other = on_gpu("slots"), embed.Pipeline(library, made["bundle"], backend=b"openvino", threads=1)
    lora = pipe.open_lora(path)
    merged = generate(other, **given).latents
    other.close()
    close(generate(pipe, **given).latents, reference[f"step{case['nfe'] - 1}.latents"])
    for _ in range(3):
        found = generate(pipe, loras=[(lora, 0.8)], **given).latents
        assert np.abs(found - merged).max() <= MERGED * np.abs(merged).max()
    pipe.close_lora(lora)


def test_a_switch_is_one_copy_before_the_launch(on_gpu, opened, driver):  # noqa: F811
    pipe = on_gpu("slots")
    loras = opened(pipe, "slots")
    sets = [named(loras, scales) for scales in ({"a": 0.8}, {"b": -0.5})]
    images = [generate(pipe, loras=given).latents for given in (*sets, *sets)][2:]
    driver.reset()
    for i, expected in ((0, 1), (1, 1), (1, 0)):
        before = driver.calls("cuMemcpyAsync")
        np.testing.assert_array_equal(generate(pipe, loras=sets[i]).latents, images[i])
        # The first text encoder has slots, and its results are cached by LoRAs.
        assert driver.calls("cuMemcpyAsync") - before == expected
    assert (driver.calls("cuGraphLaunch"), driver.calls("cuStreamBeginCapture")) == (3, 0)
    assert not [call for call in driver.log() if "Alloc" in call]


@pytest.mark.slow
def test_threads_with_sets_of_their_own(on_gpu, plain, opened):  # noqa: F811
    pipe, cpu = on_gpu("slots"), plain("slots")
    ours, theirs = opened(pipe, "slots"), opened(cpu, "slots")
    sets = [{}, {"a": 1}, {"b": 1}, {"wide": 1}, {"a": 0.5, "b": 0.5}, {"a": -1}, {"b": 0.2}, {"a": 1, "wide": 1}]
    expected = [generate(cpu, loras=named(theirs, scales)).latents for scales in sets]
    with ThreadPoolExecutor(8) as pool:
        images = pool.map(lambda scales: generate(pipe, loras=named(ours, scales)).latents, sets * 3)
        for image, right in zip(images, expected * 3, strict=True):
            np.testing.assert_allclose(image, right, **CLOSE)


def test_too_little_memory_for_loras_says_so(on_gpu, plain, opened, driver):  # noqa: F811
    pipe = on_gpu("slots")
    loras, theirs = opened(pipe, "slots"), opened(plain("slots"), "slots")
    generate(pipe)
    driver.set_memory(driver.live(Live.DEVICE_BYTES) + 4096)
    with pytest.raises(embed.ArcFlowError, match=r"^LoRAs of rank 32 need [\d,]+ bytes of ") as caught:
        generate(pipe, loras=named(loras, {"widest": 1}))
    assert caught.value.status == OUT_OF_MEMORY
    driver.set_memory(8 << 30)
    expected = generate(plain("slots"), loras=named(theirs, {"a": 1})).latents
    np.testing.assert_allclose(generate(pipe, loras=named(loras, {"a": 1})).latents, expected, **CLOSE)


# Memory modes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def weighed(library, on_gpu):  # noqa: F811
    """As `on_gpu`, with engines whose weights take device memory, as many bytes as their file has."""

    def make(*arguments, **options):
        library.host_backends_weights(1)
        return on_gpu(*arguments, **options)

    return make


def weights_of(manifest):
    return {name: manifest.files[part.weights].bytes for name, part in manifest.parts.items()}


def sums_of(name, size):
    """The Python runtime's sums, with the activations that the tests' engines ask for."""
    m = Bundle.open(ROOTS[name]).manifest
    firsts = {part: next(iter(inputs.values())) for part, inputs in part_inputs(m, size).items()}
    return make_sums(m, size, TENSORRT, weights_of(m), {p: 64 * int(np.prod(shape)) for p, shape in firsts.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen", "conditioner", "float16"])
def test_images_are_equal_in_all_modes(name, weighed):
    """Plain, captured and replayed, also after a new prompt, guidance scale, number of steps and batch."""
    calls = [{"prompts": [p]} for p in (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0])]
    calls += [{"num_images_per_prompt": 2}, {"prompts": [*PROMPTS], "seeds": [5, 6]}]
    if name == "flux":
        calls += [{"guidance_scale": 7.0}, {"num_inference_steps": 3}]
    expected = None
    for memory in MODES:
        pipe = weighed(name, memory=memory.encode())
        assert pipe.memory == memory
        found = [generate(pipe, name, skip_decode=0, **call) for call in calls]
        expected = expected or found
        for image, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(image.latents, wanted.latents)
            np.testing.assert_array_equal(image.pixels, wanted.pixels)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("name", ["flux", "slots"])
def test_bytes_held_in_each_stage_are_those_of_the_sums(name, memory, library, weighed, driver):  # noqa: F811
    """To the byte, except the encoders' inputs and outputs in "balanced": they are freed when the engine is closed."""
    before = driver.live(Live.DEVICE_BYTES)
    pipe = weighed(name, memory=memory.encode())
    generate(pipe, skip_decode=0)
    held = {}
    act = _Act(lambda part, stream: held.setdefault(part.decode(), driver.live(Live.DEVICE_BYTES) - before) and None)
    library.host_backends_before_enqueue(act)
    generate(pipe, prompts=[PROMPTS[1]], skip_decode=0)
    library.host_backends_before_enqueue(None)
    held[BETWEEN] = driver.live(Live.DEVICE_BYTES) - before
    sums = sums_of(name, ImageSize(1, 32, 48, TOKENS, 2))
    expected = sums.stages(memory)
    # A replay enqueues no engine.
    assert held.keys() == expected.keys()
    arrays = sum(sums.parts[part].arrays for part in sums.by_host[memory]) if memory == "balanced" else 0
    for stage, nbytes in expected.items():
        assert nbytes - arrays <= held[stage] <= nbytes, (stage, held, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen", "slots"])
def test_the_mode_follows_from_the_free_memory(name, library, weighed, driver, capfd):  # noqa: F811
    """The mode is the one that the Python runtime's sums say, to the byte."""
    manifest = Bundle.open(ROOTS[name]).manifest
    sums = sums_of(name, usual_size(manifest))
    peaks = [sums.peak(mode) for mode in MODES]
    live = driver.live(Live.DEVICE_BYTES)
    for mode, peak in zip(MODES, peaks, strict=True):
        for room in (peak, peak - 1):
            chosen = next((m for m, p in zip(MODES, peaks, strict=True) if p <= room), "low")
            driver.set_memory(live + room)
            capfd.readouterr()
            pipe = weighed(name)
            assert pipe.memory == chosen, (mode, room)
            pipe.close()
            said = capfd.readouterr().err.splitlines()
            assert len(said) == (chosen != "resident")
            start = f'arcflow: memory "{chosen}" is used: an image of '
            assert all(line.startswith(start) for line in said)
            assert all(("generate smaller images" in line) == (room < peaks[2]) for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
def test_the_memory_of_the_sums_is_enough(memory, weighed, driver):
    sums = sums_of("flux", ImageSize(1, 32, 48, TOKENS, 2))
    driver.set_memory(driver.live(Live.DEVICE_BYTES) + sums.peak(memory))
    pipe = weighed("flux", memory=memory.encode())
    for prompt in (*PROMPTS, *PROMPTS):
        generate(pipe, prompts=[prompt], skip_decode=0)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MODES)
def test_threads_in_each_mode(memory, weighed):
    """An image has the same bits whichever prompts other threads bring their encoders for."""
    pipe = weighed("flux", memory=memory.encode())
    cases = [{"prompts": [PROMPTS[i % 2]], "seeds": [i], "guidance_scale": 1.0 + i} for i in range(6)]
    alone = [generate(pipe, **case).latents for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for number, found in enumerate(pool.map(lambda case: generate(pipe, **case).latents, cases * 3)):
            np.testing.assert_array_equal(found, alone[number % len(cases)])
