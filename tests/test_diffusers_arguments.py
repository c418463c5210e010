"""The pipeline takes diffusers' spellings where they mean the same, and names what it does not take."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_bundle import POOLED, TEXT, FakeBackend, make_bundle

from arcflow_runtime import Pipeline, RequestError
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.maths.noise import draw_latents

GOOD = {"prompt": "x", "height": 32, "width": 48}
NOISE = draw_latents(5, 1, 16, 4, 6, 2)  # [1, 6, 64]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    return {"flux": make_bundle(folder / "flux"), "qwen": make_bundle(folder / "qwen", "qwen-image", baked=(2,))}


def open_fake(root):
    pipe = Pipeline(Bundle.open(root), FakeBackend())
    pipe.backend = pipe._parts._backend
    return pipe


@pytest.fixture
def flux(roots):
    return open_fake(roots["flux"])


@pytest.fixture
def qwen(roots):
    return open_fake(roots["qwen"])


def latents(pipe, **arguments):
    return pipe(**(GOOD | {"output_type": "latent"} | arguments)).images


def test_output_types(flux):
    for theirs, ours in (("np", "numpy"), ("latent", "latents"), ("pil", "pil")):
        a, b = (flux(**GOOD, seed=1, output_type=name).images for name in (theirs, ours))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert type(a) is type(b)


def test_a_generator_is_its_initial_seed(flux):
    """One draws the whole batch, as with diffusers; a list draws one image each."""
    generator = torch.Generator().manual_seed(7)
    output = flux(**GOOD, generator=generator, num_images_per_prompt=2, output_type="latent")
    np.testing.assert_array_equal(output.images, latents(flux, seed=7, num_images_per_prompt=2))
    assert output.seed == 7
    pair = [torch.Generator().manual_seed(s) for s in (2**64 - 1, 3)]
    output = flux(**GOOD, generator=pair, num_images_per_prompt=2, output_type="latent")
    np.testing.assert_array_equal(output.images, latents(flux, seed=[2**64 - 1, 3], num_images_per_prompt=2))
    assert output.seed == (2**64 - 1, 3)


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_latents_are_the_noise(family, request):
    pipe = request.getfixturevalue(family)
    for given in (NOISE, NOISE.astype(np.float64), torch.from_numpy(NOISE), NOISE.tolist()):
        output = pipe(**GOOD, latents=given, output_type="latent")
        np.testing.assert_array_equal(output.images, latents(pipe, seed=5))
        assert output.seed is None
    two = np.concatenate([NOISE, draw_latents(6, 1, 16, 4, 6, 2)])
    drawn = latents(pipe, prompt=["a", "bb"], latents=two)
    np.testing.assert_array_equal(drawn, latents(pipe, prompt=["a", "bb"], seed=[5, 6]))


def test_latents_are_copied(flux):
    """A step callback must not be able to change what the caller holds, nor the caller what is used."""
    mine = NOISE.copy()
    latents(flux, latents=mine)
    assert mine.flags.writeable
    np.testing.assert_array_equal(mine, NOISE)


def test_embeddings_in_place_of_a_prompt(flux):
    """What the encoders give for prompts, given back, draws what the prompts draw."""
    prompts = ["a", "a longer prompt"]
    expected = latents(flux, prompt=prompts, seed=[1, 2, 3, 4], num_images_per_prompt=2, max_sequence_length=8)
    kept = [flux._cache.get(p, 8) for p in prompts]
    states, pooled = (np.concatenate([getattr(e, name) for e in kept]) for name in ("states", "pooled"))
    ran = len(flux.backend.runs)
    for cast in (np.asarray, torch.from_numpy):
        drawn = flux(
            prompt_embeds=cast(states),
            pooled_prompt_embeds=cast(pooled),
            height=32,
            width=48,
            seed=[1, 2, 3, 4],
            num_images_per_prompt=2,
            output_type="latent",
        )
        np.testing.assert_array_equal(drawn.images, expected)
    assert not {"text_encoder", "text_encoder_2"} & {part for part, _ in flux.backend.runs[ran:]}


def test_embeddings_without_pooled_text(qwen):
    expected = latents(qwen, seed=1)
    states = qwen._cache.get("x", 64).states
    drawn = qwen(prompt_embeds=states, height=32, width=48, seed=1, output_type="latent").images
    np.testing.assert_array_equal(drawn, expected)


def test_none_and_defaults_are_as_left_out(flux):
    same = latents(flux, seed=1, negative_prompt=None, prompt_2=None, return_dict=True, generator=None, latents=None)
    np.testing.assert_array_equal(same, latents(flux, seed=1))


CUDA = SimpleNamespace(initial_seed=lambda: 1, device=SimpleNamespace(type="cuda"))
STATES, VECTOR = np.zeros((1, 4, TEXT)), np.zeros((1, POOLED))
EMBEDS = {"prompt": None, "prompt_embeds": STATES, "pooled_prompt_embeds": VECTOR}


def diffusers_callback(pipe, step, timestep, callback_kwargs):
    """With diffusers' arguments."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"negative_prompt": "ugly"},
            "negative_prompt is not supported: the student is distilled to run once per step, without a negative "
            "prompt; leave it out",
        ),
        ({"prompt_2": "x"}, "prompt_2 is not supported: both text encoders read the same prompt; leave it out"),
        (
            {"sigmas": [1.0, 0.5]},
            "sigmas is not supported: the student was trained for the bundle's schedule; give num_inference_steps; "
            "leave it out",
        ),
        (
            {"return_dict": False},
            "return_dict is not supported: the result is always an object with the field images; leave it out",
        ),
        ({"hight": 64}, "unknown argument 'hight'; see help(Pipeline.__call__)"),
        (
            {"seed": 1, "generator": torch.Generator()},
            "seed and generator must not be given together: each of them decides the noise",
        ),
        (
            {"seed": 1, "latents": NOISE},
            "seed and latents must not be given together: each of them decides the noise",
        ),
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3; or give seed"),
        (
            {"generator": [CUDA]},
            "generator[0] must be a generator on the CPU, got one on cuda, which draws other numbers; or give seed",
        ),
        (
            {"generator": [torch.Generator(), torch.Generator()]},
            "seed must be an integer or a list of 1, one per image, got a list of 2",
        ),
        (
            {"latents": NOISE[:, 1:]},
            "latents must have shape [1, 6, 64] (images, tokens, packed channels), got [1, 5, 64]",
        ),
        ({"latents": NOISE * np.nan}, "latents must be finite in float32, got NaN or Inf"),
        ({"latents": "x"}, "latents must be an array of numbers, got str (numbers of type <U1)"),
        (
            EMBEDS | {"prompt": "x"},
            "prompt and prompt_embeds must not be given together: each of them is the text",
        ),
        (
            {"pooled_prompt_embeds": VECTOR},
            "pooled_prompt_embeds must be given with prompt_embeds, in place of a prompt",
        ),
        (
            EMBEDS | {"pooled_prompt_embeds": None},
            "pooled_prompt_embeds must be given with prompt_embeds: this student needs pooled text",
        ),
        (
            EMBEDS | {"prompt_embeds": np.zeros((1, 65, TEXT))},
            f"prompt_embeds must have shape [prompts, tokens, {TEXT}] with 1 to 64 tokens, got [1, 65, {TEXT}]",
        ),
        (
            EMBEDS | {"prompt_embeds": STATES[0]},
            f"prompt_embeds must have shape [prompts, tokens, {TEXT}] with 1 to 64 tokens, got [4, {TEXT}]",
        ),
        (
            EMBEDS | {"pooled_prompt_embeds": np.zeros((2, POOLED))},
            f"pooled_prompt_embeds must have shape [1, {POOLED}], one row for each of prompt_embeds, got [2, {POOLED}]",
        ),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
        (
            {"callback_on_step_end": diffusers_callback},
            "callback_on_step_end must take the step and the latents, got a function of (pipe, step, timestep, "
            "callback_kwargs): diffusers' arguments (pipe, step, timestep, kwargs) are not passed, since a callback "
            "cannot replace the latents",
        ),
    ],
)
def test_what_is_not_taken_is_named(flux, arguments, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        flux(**(GOOD | arguments))
    assert flux.backend.runs == []


def test_pooled_text_is_not_for_every_student(qwen):
    with pytest.raises(
        RequestError, match=r"^pooled_prompt_embeds is not supported: this student has no pooled text; "
    ):
        qwen(prompt_embeds=STATES, pooled_prompt_embeds=VECTOR)
