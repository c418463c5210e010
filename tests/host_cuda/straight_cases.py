"""Straight students from the GPU runtime on the driver made of host memory: steps, guidance, and what a plan has.

`CLOSE` holds for them too: an unguided step has the CPU's bits, and the norms of a guided one are summed in another
order, a few units of 2^-24.
"""

from __future__ import annotations

import numpy as np
import pytest

from arcflow_runtime import RequestError
from arcflow_runtime.engines.modes import MODES
from tests.host_cuda.images import CLOSE, PROMPTS, generate, levels
from tests.lora_slots import write_lora

#: Texts are not cut, so that the two have different lengths.
GUIDED = {"negative_prompt": "blurred, ugly", "max_sequence_length": 256}
#: Bundle, and what a request for it has. "flux" and "qwen" have a shift that depends on the size, "table" has not.
KINDS = [("straight flux", {}), ("straight qwen", {}), ("straight qwen", GUIDED), ("straight table", GUIDED)]


def backbone_shapes(pipe):
    """The shapes of the text states of every backbone context that was made."""
    return [inputs["encoder_hidden_states"][:2] for part, inputs in pipe.backend.contexts if part == "backbone"]


@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_plain_captured_and_replayed_images_are_those_of_the_cpu(name, arguments, on_gpu, plain, driver):
    """Two sizes, which have schedules of their own where the shift depends on the size."""
    pipe = on_gpu(name)
    for graphs, width in enumerate((48, 32), 1):
        wanted = {"num_inference_steps": 4, "width": width, **arguments}
        first = generate(pipe, **wanted)
        np.testing.assert_allclose(first, generate(plain[name], **wanted), **CLOSE)
        for launch in (1, 2):
            np.testing.assert_array_equal(generate(pipe, **wanted), first)
            assert driver.calls("cuStreamBeginCapture") == graphs
            assert driver.calls("cuGraphLaunch") == 2 * (graphs - 1) + launch
    # One for each size, and with guidance one for each length of text.
    assert len(backbone_shapes(pipe)) == 2 * (2 if arguments else 1)


@pytest.mark.slow
def test_float16(on_gpu, plain):
    pipe = on_gpu("straight float16")
    expected = generate(plain["straight float16"], num_inference_steps=4)
    for _ in range(3):
        np.testing.assert_allclose(generate(pipe, num_inference_steps=4), expected, **CLOSE)


def test_as_many_steps_as_a_teacher_has(on_gpu, plain, driver):
    """The conditioner takes 8 steps at once."""
    pipe = on_gpu("straight qwen")
    pipe.backend.limits = lambda part, shapes: (
        "too many steps" if part == "conditioner" and shapes["timesteps"][0] > 8 else None
    )
    first = generate(pipe, num_inference_steps=50, **GUIDED)
    assert [pipe.backend.enqueues.count(part) for part in ("conditioner", "backbone")] == [7, 100]
    np.testing.assert_allclose(first, generate(plain["straight qwen"], num_inference_steps=50, **GUIDED), **CLOSE)
    np.testing.assert_array_equal(generate(pipe, num_inference_steps=50, **GUIDED), first)
    assert driver.calls("cuGraphLaunch") == 1


def test_prompts_are_grouped_by_both_lengths(on_gpu, plain):
    pipe, name = on_gpu("straight qwen"), "straight qwen"
    prompts, whole = ["aa", "bbbb", "aa", "cc"], {"max_sequence_length": 256}
    negatives = ["x", "x", "a longer one", "y"]
    for _ in range(2):
        found = generate(pipe, prompts, negative_prompt=negatives, **whole)
        np.testing.assert_allclose(found, generate(plain[name], prompts, negative_prompt=negatives, **whole), **CLOSE)
    batches = [shape[0] for shape in backbone_shapes(pipe)]
    assert sorted(batches) == [1, 1, 1, 1, 2, 2]  # "aa" and "cc", "bbbb", and "aa" with the longer one


def test_texts_of_one_length_share_a_context(on_gpu, plain, driver):
    """A graph serves any negative prompts of a length and any scale."""
    pipe, prompt = on_gpu("straight qwen"), PROMPTS[1]
    for negative, scale in ((PROMPTS[1], 4), (PROMPTS[1][::-1], 4), (PROMPTS[1][::-1], 2.5)):
        arguments = {"negative_prompt": negative, "true_cfg_scale": scale}
        found, expected = (generate(p, prompt, **arguments) for p in (pipe, plain["straight qwen"]))
        np.testing.assert_allclose(found, expected, **CLOSE)
    assert len(backbone_shapes(pipe)) == 1
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 2)


def test_memory_modes_callbacks_and_previews(on_gpu, plain):
    expected, before = {}, []
    arguments = {"num_inference_steps": 3, **GUIDED}
    keep = {"callback_on_step_end": expected.__setitem__, "callback_on_preview": lambda i, x: before.append(x.copy())}
    generate(plain["straight qwen"], **arguments, **keep)
    for memory in MODES:
        pipe, steps, previews = on_gpu("straight qwen", memory=memory), {}, []
        last = generate(
            pipe, **arguments,
            callback_on_step_end=steps.__setitem__,
            callback_on_preview=lambda i, x, previews=previews: previews.append(x.copy()),
        )  # fmt: skip
        assert list(steps) == [0, 1, 2]
        for step, latents in steps.items():
            np.testing.assert_allclose(latents, expected[step], **CLOSE)
        np.testing.assert_array_equal(steps[2], last)
        assert len(previews) == 1
        np.testing.assert_allclose(previews[0], before[0], **CLOSE)


def test_batches_are_cut_to_what_the_engines_take(on_gpu, plain):
    pipe = on_gpu("straight qwen")
    pipe.backend.limits = lambda part, shapes: (
        f"{part}: too many" if part == "backbone" and shapes["latents"][0] > 2 else None
    )
    prompts, negatives = ["aa", "bb", "cc"], ["d", "e", "f"]
    found, expected = (generate(p, prompts, negative_prompt=negatives) for p in (pipe, plain["straight qwen"]))
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_pixels(on_gpu, plain):
    """A value next to a rounding boundary may differ by one level."""
    found, expected = (
        levels(generate(p, output_type="pil", **GUIDED)) for p in (on_gpu("straight qwen"), plain["straight qwen"])
    )
    assert np.abs(found - expected).max() <= 1


def test_loras(on_gpu, plain, tmp_path):
    pipe, cpu = on_gpu("straight slots"), plain["straight slots"]
    path = write_lora(tmp_path / "a.safetensors", pipe.bundle.manifest.slots(), 4, 1)
    for p in (pipe, cpu):
        p.load_lora(path)
    images = []
    for loras in ({}, {"a": 1}, {"a": 0.5}):
        found, expected = (generate(p, loras=loras, **GUIDED) for p in (pipe, cpu))
        np.testing.assert_allclose(found, expected, **CLOSE)
        images.append(found)
    assert all(np.abs(image - images[0]).max() > 1e-3 for image in images[1:])


def test_warm_up_makes_the_guided_graph(on_gpu, driver):
    pipe = on_gpu("straight qwen")
    pipe.warm_up([(1, 32, 48)], text_tokens=16, negative_text_tokens=16)
    generate(pipe, PROMPTS[1], negative_prompt=PROMPTS[1][::-1], output_type="pil")
    assert (driver.calls("cuStreamBeginCapture"), driver.calls("cuGraphLaunch")) == (1, 2)
    with pytest.raises(RequestError, match=r"^negative_prompt is not supported: this model is guided by "):
        on_gpu("straight flux").warm_up([(1, 32, 48)], negative_text_tokens=16)
