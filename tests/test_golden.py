"""Exported bundles, run by the runtime, against the reference implementation's own numbers, step by step."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arcflow_runtime import Pipeline
from arcflow_runtime.maths.noise import draw_latents
from tests.conftest import FAMILIES, GOLDEN
from tests.fake_bundle import TOKENIZERS
from tests.golden_cases import arguments, check_case, golden

CASES = [(f, i) for f in FAMILIES for i in range(3)]


@pytest.fixture(scope="module", params=[pytest.param(20, marks=pytest.mark.slow), 23], ids=["opset20", "opset23"])
def pipelines(request, bundles):
    return {f: Pipeline.load(bundles(f, opset=request.param, steps=(2, 4))) for f in FAMILIES}


@pytest.mark.parametrize(("name", "index"), CASES)
def test_latents_of_every_step_and_image(pipelines, name, index):
    case, reference = golden(name, index)
    steps: list[np.ndarray] = []
    out = pipelines[name](
        **arguments(case), output_type="numpy", callback_on_step_end=lambda _, x: steps.append(x.copy())
    )
    assert len(steps) == case["nfe"]
    check_case(reference, steps, out.images)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_noise(name, index):
    case, reference = golden(name, index)
    noise = draw_latents(case["seed"], 1, 16, case["height"] // 8, case["width"] // 8, 2)
    # The reference's noise is torch's; ours is built from the same integers and differs by libm's last places.
    np.testing.assert_allclose(noise, reference["noise"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_what_transformers_makes_of_the_students(name):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDEN / name)
    assert json.loads(TOKENIZERS[name].read_text()) == json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_list_of_prompts_is_the_prompts_one_by_one(pipelines, name):
    """A picture does not depend on its neighbours in the batch, whatever the lengths of their prompts."""
    pipe, prompts = pipelines[name], ["a red circle", "an old sailor in a dark rainy street at night", ""]
    together = pipe(
        prompts, height=64, width=48, seed=[1, 2, 3, 4, 5, 6], num_images_per_prompt=2, output_type="latents"
    )
    for i, prompt in enumerate(p for p in prompts for _ in range(2)):
        alone = pipe(prompt, height=64, width=48, seed=[i + 1], output_type="latents")
        # Batched matrix products may sum in another order.
        np.testing.assert_allclose(together.images[i], alone.images[0], rtol=0, atol=1e-5 * np.abs(alone.images).max())
