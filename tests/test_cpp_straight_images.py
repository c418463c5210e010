"""Images of straight students in C++ against the Python pipeline: real bundles, with OpenVINO and ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_runtime import Bundle, Pipeline, cli
from arcflow_runtime.disk.manifest import DynamicShift, Schedule
from arcflow_runtime.lora.converted import write_converted
from arcflow_runtime.lora.open import open_lora
from tests.cpp import REQUEST_ERROR, close, embed, ids_of, run
from tests.fake_bundle import GOLDEN
from tests.lora_slots import write_lora
from tests.straight_bundle import straighten
from tests.test_cpp_programs import post, serving

PROMPTS = ["a red circle", "an old sailor in a dark rainy street at night"]
NEGATIVES = ["blurred, ugly", " "]


def command(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def straight(once, traces):
    """A function (golden name, *options of the export) -> bundle of the base alone, with OpenVINO's tokenizers."""

    @functools.cache
    def get(name: str, *options: str) -> Path:
        def make(folder: Path) -> None:
            small = ["--max-px", "256", "--max-sequence-length", "256" if name == "qwen-tiny" else "64"]
            command("export", "--base", GOLDEN / name / "base", "--out", folder / "bundle", *small, *options)
            command("build", folder / "bundle", "--backend", "openvino")

        return once(f"straight in C++ {name} {options}", make) / "bundle"

    return get


@pytest.fixture(scope="module")
def pipes(cpp_library):
    """A function (bundle) -> the pipelines of C++ and of Python, opened once."""
    made: dict[Path, tuple] = {}

    def get(root: Path):
        if root not in made:
            made[root] = embed.Pipeline(cpp_library, root), Pipeline.load(root, threads=1)
        return made[root]

    yield get
    for ours, theirs in made.values():
        ours.close()
        theirs.close()


def compare(pipes, root: Path, height: int, width: int, *, ours=None, theirs=None, **common) -> None:
    """Check latents after each step, pixels and the number of warnings of the same request in both libraries."""
    cpp, python = pipes(root)
    steps: tuple[list, list] = [], []
    given = {"height": height, "width": width} | common
    got = cpp.generate(
        **({"prompts": PROMPTS} | given | (ours or {})), seeds=[5], on_step=lambda _, x: steps[0].append(x)
    )
    output = python(
        **({"prompt": PROMPTS} | given | (theirs or {})),
        seed=5,
        callback_on_step_end=lambda _, x: steps[1].append(x.copy()),
    )
    assert len(steps[0]) == len(steps[1])
    for a, b in zip(*steps, strict=True):
        close(a.reshape(b.shape), b)
    pixels = np.stack([np.asarray(image) for image in output.images])
    assert np.abs(got.pixels.astype(int) - pixels).max() <= 1
    assert len(got.warnings) == len(output.warnings)
    assert got.timings_ms.keys() == output.timings_ms.keys() | {"engines"}


#: Schedule, scale and request of a straight student made of an ArcFlow student's bundle.
MADE = {
    "flux-tiny": (Schedule(1.0, 1.0, 2, DynamicShift("exponential", 0.5, 1.15, 256, 4096), 0.05), None, {}),
    "qwen-tiny": (Schedule(3.0, 1.0, 2), 4.0, {"negative_prompt": NEGATIVES}),
}


@pytest.mark.parametrize("name", MADE)
def test_the_image_is_pythons(cpp_bundles, pipes, once, name):
    schedule, scale, theirs = MADE[name]
    make = lambda folder: straighten(cpp_bundles(name), folder / "bundle", schedule, scale)  # noqa: E731
    root = once(f"straight {name} in C++", make) / "bundle"
    ours = {"negative_prompts": theirs["negative_prompt"]} if theirs else {}
    compare(pipes, root, 48, 64, ours=ours, theirs=theirs, max_sequence_length=128)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 8, 28])
def test_flux(straight, pipes, steps):
    root = straight("flux-tiny")
    assert Bundle.open(root).manifest.schedule.dynamic_shift is not None
    compare(pipes, root, 64, 96, num_inference_steps=steps, guidance_scale=2.5)
    if steps == 4:
        compare(pipes, root, 208, 32, num_inference_steps=steps)


@pytest.mark.slow
def test_own_sigmas(straight, pipes):
    root = straight("flux-tiny", "--sigmas", "1,0.7,0.4")
    compare(pipes, root, 48, 80)
    with pytest.raises(embed.ArcFlowError) as e:
        pipes(root)[0].generate(PROMPTS, num_inference_steps=2)
    assert (e.value.status, str(e.value)) == (
        REQUEST_ERROR,
        "request.num_inference_steps must be 3, the number of sigmas in this bundle's schedule, got 2; "
        "export without --sigmas for other step counts",
    )


QWEN = ("qwen-tiny", "--steps", "4")
GUIDED = [
    ({}, {}),
    ({"negative_prompts": [" "]}, {"negative_prompt": " "}),
    ({"negative_prompts": NEGATIVES, "num_images_per_prompt": 2}, {"negative_prompt": NEGATIVES}),
    ({"negative_prompts": NEGATIVES, "true_cfg_scale": 2.5}, {"negative_prompt": NEGATIVES}),
    ({"negative_prompts": NEGATIVES, "true_cfg_scale": 1.0}, {"negative_prompt": NEGATIVES}),
    ({"negative_prompts": ["word " * 600]}, {"negative_prompt": "word " * 600}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), GUIDED, ids=["plain", "one", "each", "scale", "off", "cut"])
def test_qwen(straight, pipes, ours, theirs):
    ours = dict(ours)
    common = {name: ours.pop(name) for name in ("true_cfg_scale", "num_images_per_prompt") if name in ours}
    for steps in (2, 4):
        compare(pipes, straight(*QWEN), 96, 64, ours=ours, theirs=theirs, num_inference_steps=steps, **common)


@pytest.mark.slow
def test_token_ids_of_a_negative_prompt(straight, pipes):
    root = straight(*QWEN)
    cpp, _ = pipes(root)
    size = {"height": 64, "width": 48, "seeds": [3]}
    by_text = cpp.generate(PROMPTS[:1], negative_prompts=NEGATIVES[:1], **size)
    tokens = {"tokens": [ids_of(root, PROMPTS[0])], "negative_tokens": [ids_of(root, NEGATIVES[0])]}
    np.testing.assert_array_equal(cpp.generate(**tokens, **size).latents, by_text.latents)


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(straight, pipes):
    cpp, _ = pipes(straight(*QWEN))
    size = {"height": 64, "width": 48}
    together = cpp.generate(PROMPTS, negative_prompts=NEGATIVES, seeds=[1, 2], **size).latents
    for i in range(2):
        alone = cpp.generate([PROMPTS[i]], negative_prompts=[NEGATIVES[i]], seeds=[i + 1], **size).latents[0]
        # Batched matrix products may sum in another order.
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.slow
def test_lightning_with_a_table(straight, pipes):
    compare(pipes, straight("qwen-tiny", "--schedule", "lightning", "--steps", "8,4"), 64, 80)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_lora_slots(straight, pipes, tmp_path, name):
    root = straight(name, "--steps", "4", "--lora-slots", "all", "--lora-max-rank", "16")
    manifest = Bundle.open(root).manifest
    raw = write_lora(tmp_path / "raw.safetensors", manifest.slots(), 4, 1)
    write_converted(tmp_path / "ink.safetensors", open_lora(raw, "ink", manifest), manifest)
    cpp, python = pipes(root)
    ink = cpp.open_lora(tmp_path / "ink.safetensors")
    python.load_lora(tmp_path / "ink.safetensors", "ink")
    guided = name == "qwen-tiny"
    ours = {"loras": [(ink, 0.8)]} | ({"negative_prompts": [" "]} if guided else {})
    theirs = {"loras": {"ink": 0.8}} | ({"negative_prompt": " "} if guided else {})
    compare(pipes, root, 48, 64, ours=ours, theirs=theirs)
    cpp.close_lora(ink)


@pytest.mark.slow
def test_int8(straight, pipes, tmp_path):
    """OpenVINO and ONNX Runtime may quantise activations differently (B15), so images are only near to each other."""
    root, int8 = straight("flux-tiny"), tmp_path / "int8"
    command("quantize", root, "--format", "int8", "--out", int8)
    command("build", int8, "--backend", "openvino")
    size = {"height": 64, "width": 64, "num_inference_steps": 4}
    ours = pipes(int8)[0].generate(PROMPTS, seeds=[5], **size).latents
    theirs = pipes(int8)[1](PROMPTS, seed=5, output_type="latents", **size).images
    full = pipes(root)[0].generate(PROMPTS, seeds=[5], **size).latents
    # The rounding to int8 is what tells either from float32, and is independent in the two at worst.
    error = np.abs(theirs - full).max()
    assert np.abs(ours - full).max() > 0
    assert np.abs(ours - theirs).max() <= 2 * error


@pytest.mark.slow
def test_the_examples(straight, pipes, cpp_build, tmp_path):
    root, out = straight(*QWEN), tmp_path / "out.ppm"
    expected = pipes(root)[0].generate(PROMPTS[:1], negative_prompts=[" "], seeds=[42]).pixels[0]
    run([cpp_build / "example_generate", root, PROMPTS[0], out, "42", " "])
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)
    with serving(cpp_build, root) as (_, url):
        body = {"prompt": PROMPTS[0], "negative_prompt": " ", "seed": 42}
        status, image, _ = post(url, json.dumps(body).encode())
        assert status == 200
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), expected)
        status, error, _ = post(url, json.dumps(body | {"true_cfg_scale": 66}).encode())
        text = "request.true_cfg_scale must be between 0 and 65, got 66.0; 0 is the bundle's own scale"
        assert (status, json.loads(error)) == (400, {"error": text})
