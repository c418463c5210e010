"""LoRAs in the C++ library: the same inputs and images as in Python, in any order, by many threads, and every error."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_void_p
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import make_bundle
from safetensors.numpy import load_file, save_file

from arcflow_runtime import Bundle, Pipeline
from arcflow_runtime.errors import RequestError
from arcflow_runtime.lora.converted import write_converted
from arcflow_runtime.lora.open import open_lora
from arcflow_runtime.lora.prepare import prepare
from tests.cpp import CLOSED, REQUEST_ERROR, close, embed, ids_of
from tests.lora_slots import add_slots, write_lora
from tests.test_cpp_core import core, tool  # noqa: F401

LORA_ERROR = 7
ALL = {"lora_slots": ("*",), "lora_max_rank": 32}
NAMES = ("flux-tiny", "qwen-tiny")
SIZE = {"height": 48, "width": 64, "max_sequence_length": 128}
PROMPT = "a red circle"
Q, CLIP = "transformer_blocks.0.attn.to_q", "text_model.encoder.layers.0.self_attn.q_proj"


def convert(root: Path, path: Path, rank: int = 4, seed: int = 0, only: str = "") -> Path:
    """Write a LoRA of the bundle's slots, converted for it."""
    manifest = Bundle.open(root).manifest
    raw = write_lora(path.with_suffix(".raw.safetensors"), manifest.slots(), rank, seed, only)
    write_converted(path, open_lora(raw, path.stem, manifest), manifest)
    return path


@pytest.fixture(scope="module")
def slotted(bundles):
    return lambda name: bundles(name, **ALL)


@pytest.fixture(scope="module")
def files(slotted, tmp_path_factory):
    """A function (golden name, number) -> a converted LoRA of all slots of that student."""
    folder = tmp_path_factory.mktemp("loras")

    def get(name: str, seed: int = 0) -> Path:
        path = folder / f"{name}-{seed}.safetensors"
        return path if path.exists() else convert(slotted(name), path, seed=seed)

    return get


@pytest.fixture(scope="module")
def pipes(cpp_library, slotted):
    """A function (golden name) -> the C++ library's pipeline of the bundle with slots."""
    made: dict[str, embed.Pipeline] = {}

    def get(name: str) -> embed.Pipeline:
        if name not in made:
            made[name] = embed.Pipeline(cpp_library, slotted(name))
        return made[name]

    yield get
    for pipe in made.values():
        pipe.close()


def draw(pipe, bundle: Path, seed: int = 3, prompt: str = PROMPT, **fields):
    return pipe.generate(tokens=[ids_of(bundle, prompt)], seeds=[seed], **(SIZE | fields))


# The inputs of the slots, bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_inputs_are_pythons(core, tmp_path, precision):  # noqa: F811
    layers = {"backbone": {Q: (6, 5)}, "text_encoder": {CLIP: (4, 4)}}
    root = add_slots(make_bundle(tmp_path / "bundle", precision=precision), layers)
    manifest = Bundle.open(root).manifest
    ink = convert(root, tmp_path / "ink.safetensors", rank=3, seed=1)
    soft = convert(root, tmp_path / "soft.safetensors", rank=9, seed=2, only="to_q")
    given = [(0, open_lora(ink, "ink", manifest), 0.8), (1, open_lora(soft, "soft", manifest), -0.3)]
    wanted = prepare(manifest, given).inputs
    got = core("loras", root, ink, 0.8, soft, -0.3, dtype=np.uint8)
    arrays = [array for _, inputs in sorted(wanted.items()) for _, array in sorted(inputs.items())]
    assert [a.shape for a in arrays] == [(6, 3, 8), (3, 8, 5), (4, 1, 8), (1, 8, 4)]
    assert got.tobytes() == b"".join(a.tobytes() for a in arrays)


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_without_loras_the_bits_are_those_of_the_plain_bundle(cpp_library, bundles, slotted, pipes, name):
    plain = embed.Pipeline(cpp_library, bundles(name))
    wanted, got = draw(plain, bundles(name)), draw(pipes(name), slotted(name))
    np.testing.assert_array_equal(got.latents, wanted.latents)
    np.testing.assert_array_equal(got.pixels, wanted.pixels)
    plain.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scales", [{1: 0.8}, {1: 0.8, 2: -0.4}], ids=["one", "two"])
def test_the_image_is_pythons(slotted, pipes, files, name, scales):
    python, ours = Pipeline.load(slotted(name), threads=1), pipes(name)
    for number in scales:
        python.load_lora(files(name, number), str(number))
    loras = [(ours.open_lora(files(name, number)), scale) for number, scale in scales.items()]
    given = SIZE | {"seed": 3, "loras": {str(number): scale for number, scale in scales.items()}}
    got = draw(ours, slotted(name), loras=loras)
    close(got.latents, python(PROMPT, **given, output_type="latents").images)
    assert np.abs(got.pixels.astype(int) - np.asarray(python(PROMPT, **given).images[0])).max() <= 1
    plain = draw(ours, slotted(name))
    assert np.abs(got.latents - plain.latents).max() > 1e-2 * np.abs(plain.latents).max(), "the LoRA changes the image"
    assert "loras" in got.timings_ms and "loras" not in plain.timings_ms
    for lora, _ in loras:
        ours.close_lora(lora)


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_do_not_depend_on_what_ran_before(slotted, pipes, files, name):
    pipe, root = pipes(name), slotted(name)
    ink, soft = (pipe.open_lora(files(name, number)) for number in (1, 2))
    plain = draw(pipe, root).latents
    a, b = draw(pipe, root, loras=[(ink, 0.8)]).latents, draw(pipe, root, loras=[(soft, 0.8)]).latents
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(draw(pipe, root, loras=[(ink, 0.8)]).latents, a)
    both, turned = [(ink, 0.8), (soft, 0.4)], [(soft, 0.4), (ink, 0.8)]
    np.testing.assert_array_equal(draw(pipe, root, loras=both).latents, draw(pipe, root, loras=turned).latents)
    for nothing in ([], [(ink, 0.0)], [(ink, 0.0), (soft, -0.0)]):
        np.testing.assert_array_equal(draw(pipe, root, loras=nothing).latents, plain)
    # One that is opened again has nothing in the caches.
    pipe.close_lora(ink)
    again = pipe.open_lora(files(name, 1))
    np.testing.assert_array_equal(draw(pipe, root, loras=[(again, 0.8)]).latents, a)
    for lora in (again, soft):
        pipe.close_lora(lora)


def test_low_memory_gives_the_same_bits(cpp_library, slotted, pipes, files):
    root = slotted("flux-tiny")
    lean = embed.Pipeline(cpp_library, root, low_memory=1)
    images = []
    for pipe in (lean, pipes("flux-tiny")):
        lora = pipe.open_lora(files("flux-tiny", 1))
        images.append(draw(pipe, root, loras=[(lora, 0.8)]))
        pipe.close_lora(lora)
    np.testing.assert_array_equal(images[0].latents, images[1].latents)
    lean.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eight_threads_with_eight_sets(slotted, pipes, files, name):
    pipe, root = pipes(name), slotted(name)
    loras = [pipe.open_lora(files(name, number)) for number in range(4)]
    sets = [[(lora, 0.8)] for lora in loras] + [[(loras[0], 0.5), (lora, 0.3)] for lora in loras[1:]] + [[]]

    def generate(i: int):
        return draw(pipe, root, seed=i % 3, height=32, width=32, loras=sets[i % 8]).latents

    alone = [generate(i) for i in range(24)]  # 8 sets and 3 seeds: the next 24 are the same requests
    with ThreadPoolExecutor(8) as pool:
        for i, latents in enumerate(pool.map(generate, range(48))):
            np.testing.assert_array_equal(latents, alone[i % 24])
    for lora in loras:
        pipe.close_lora(lora)


def test_closing_a_lora_while_it_is_used(cpp_library, slotted, files):
    root = slotted("flux-tiny")
    pipe = embed.Pipeline(cpp_library, root)
    lora, small = pipe.open_lora(files("flux-tiny", 1)), {"height": 32, "width": 32}
    wanted = draw(pipe, root, **small, loras=[(lora, 0.8)]).latents
    got = draw(pipe, root, **small, loras=[(lora, 0.8)], on_step=lambda step, x: pipe.close_lora(lora))
    np.testing.assert_array_equal(got.latents, wanted)
    pipe.close_lora(lora)  # twice is allowed
    pipe.close_lora(c_void_p())
    last = pipe.open_lora(files("flux-tiny", 1))
    pipe.close()
    pipe.close_lora(last)  # after its pipeline too


# Errors ---------------------------------------------------------------------------------------------------------------


def error_of(call) -> tuple[int, str]:
    with pytest.raises(embed.ArcFlowError) as e:
        call()
    return e.value.status, str(e.value)


def rewrite(path: Path, out: Path, metadata: dict | None = None, edit=lambda tensors: None) -> Path:
    """Copy a float32 file with other metadata or tensors."""
    with path.open("rb") as f:
        found = json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, out, found | (metadata or {}))
    return out


def test_files_that_do_not_fit(pipes, files, slotted, tmp_path, cpp_pipes):
    name = "flux-tiny"
    pipe, good, bad = pipes(name), files(name, 1), tmp_path / "bad.safetensors"
    layer = f"transformer_blocks.0.attn.to_q.lora_{'a'}"
    other = f"transformer_blocks.0.attn.to_q.lora_{'b'}"
    inside = load_file(good)[layer].shape[0]

    def fails(text: str, path: Path = bad, pipe=pipe) -> None:
        assert error_of(lambda: pipe.open_lora(path)) == (LORA_ERROR, text)

    again = "convert the LoRA again"
    fails(f"{bad} is not a file; give one that `arcflow lora convert` wrote")
    raw = write_lora(bad, Bundle.open(slotted(name)).manifest.slots())
    fails(
        f"{raw} must be a converted LoRA, with the format arcflow-lora in its metadata; "
        "run `arcflow lora convert FILE --bundle BUNDLE --out OUT`"
    )
    rewrite(good, bad, {"version": "2"})
    fails(f'{bad}: version must be 1, got "2"; {again}')
    shutil.copy(files("qwen-tiny", 1), bad)
    fails(f"{bad} was converted for a bundle with other slots; {again} for this one")
    rewrite(good, bad, edit=lambda tensors: tensors.pop(other))
    fails(f'{bad} lacks "{other}"; {again}')
    rewrite(good, bad, edit=lambda tensors: tensors.update({layer: tensors[layer][:-1]}))
    fails(f"{bad}: {layer} must be F32[{inside}, any, 8], as its slot, got F32[{inside - 1}, 1, 8]; {again}")
    rewrite(good, bad, edit=lambda tensors: tensors.update({layer: tensors[layer].astype(np.float16)}))
    fails(f"{bad}: {layer} must be F32[{inside}, any, 8], as its slot, got F16[{inside}, 1, 8]; {again}")

    def enlarge(tensors):
        tensors[layer] = np.tile(tensors[layer], (1, 5, 1))
        tensors[other] = np.tile(tensors[other], (5, 1, 1))

    rewrite(good, bad, edit=enlarge)
    linear = layer.removesuffix(".lora_a")
    fails(f"{bad}: {linear} must have a rank of 1 to 32, got 5 times 8; {again}")
    rewrite(good, bad, edit=lambda tensors: tensors.update(extra=np.zeros(1, np.float32)))
    fails(f'{bad} must hold inputs of this bundle\'s slots only, at least one, got ["extra"] besides; {again}')
    rewrite(good, bad, edit=lambda tensors: tensors.clear())
    fails(f"{bad} must hold inputs of this bundle's slots only, at least one, got [] besides; {again}")
    bad.write_bytes(good.read_bytes()[:-5])
    status, text = error_of(lambda: pipe.open_lora(bad))
    assert status == LORA_ERROR and text.startswith(f"{bad}: the LoRA cannot be read ({bad}: the tensors must take the")
    assert text.endswith("; it was cut or edited); convert or copy it again")
    bad.write_bytes(b"\xff" * 64)
    assert error_of(lambda: pipe.open_lora(bad))[0] == LORA_ERROR
    plain = "this bundle has no LoRA slots; export with --lora-slots all, or merge the LoRA with --lora"
    fails(f"{good}: {plain}", good, cpp_pipes(name))


def test_requests_that_do_not_fit(cpp_library, pipes, files, slotted, tmp_path):
    name = "flux-tiny"
    pipe, root = pipes(name), slotted(name)
    other = embed.Pipeline(cpp_library, root)
    ink, theirs = pipe.open_lora(files(name, 1)), other.open_lora(files(name, 1))
    wide = pipe.open_lora(convert(root, tmp_path / "wide.safetensors", rank=32))

    def fails(text: str, loras) -> None:
        assert error_of(lambda: draw(pipe, root, loras=loras)) == (REQUEST_ERROR, text)

    for scale, shown in ((float("nan"), "nan"), (float("inf"), "inf"), (-2e6, "-2000000.0")):
        text = f"request.loras[1].scale must be between -1000000.0 and 1000000.0, got {shown}"
        fails(text, [(wide, 1.0), (ink, scale)])
    fails("request.loras[1].lora must be named once, got it again; add the two scales", [(ink, 1.0), (ink, 0.5)])
    fails(
        "request.loras[0].lora must have been opened for this pipeline, got one of another; open the file with "
        "arcflow_lora_open for this one too",
        [(theirs, 1.0)],
    )
    for stale in (c_void_p(), c_void_p(0xDEADBEEF)):
        text = "request.loras[0].lora was closed, or is not a LoRA; open it with arcflow_lora_open"
        fails(text, [(stale, 1.0)])
    assert error_of(lambda: draw(pipe, root, loras=[(ink, 1.0)] * 100))[1].startswith(
        "request.lora_count must be at most "
    )
    status, text = error_of(lambda: draw(pipe, root, loras=[(ink, 1.0), (wide, 1.0)]))
    assert status == REQUEST_ERROR
    python = Pipeline.load(root, threads=1)
    python.load_lora(files(name, 1), f"{name}-1")
    python.load_lora(tmp_path / "wide.safetensors", "wide")
    with pytest.raises(RequestError) as e:
        python(PROMPT, **SIZE, loras={f"{name}-1": 1.0, "wide": 1.0})
    # Each names the first of its own order of layers.
    for said in (text.removeprefix("request."), str(e.value)):
        assert said.startswith("loras: the ranks at ")
        assert said.split(" must add up to ")[1] == (
            f"at most 32 in this bundle, got 40: {name}-1 (8), wide (32); "
            "give fewer LoRAs, or export with --lora-max-rank 40"
        )
    other.close()
    assert error_of(lambda: other.open_lora(files(name, 1)))[0] == CLOSED
    met: list[str] = []
    draw(pipe, root, on_step=lambda step, x: met.append(error_of(lambda: pipe.open_lora(files(name, 1)))[1]) or 0)
    assert set(met) == {
        "arcflow_lora_open must not be called by on_step on the pipeline that called it; call it after on_step has "
        "returned, or on another pipeline"
    }
    for lora in (ink, wide, theirs):
        pipe.close_lora(lora)


def test_factors_beyond_the_range(pipes, files, slotted, tmp_path):
    pipe, root = pipes("flux-tiny"), slotted("flux-tiny")
    layer = "transformer_blocks.0.attn.to_q"

    def enlarge(tensors):
        tensors[f"{layer}.lora_b"] *= np.float32(1e38)

    big = pipe.open_lora(rewrite(files("flux-tiny", 1), tmp_path / "big.safetensors", edit=enlarge))
    assert error_of(lambda: draw(pipe, root, loras=[(big, 1e5)])) == (
        REQUEST_ERROR,
        f"request.loras: the factors of big at {layer} must be finite in float32, got values beyond its range; "
        "give a smaller scale",
    )
    pipe.close_lora(big)
