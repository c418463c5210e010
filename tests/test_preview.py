"""Previews of a pipeline: the exact integral to sigma 0 from a step's heads, proven with quadrature in float64."""

from __future__ import annotations

import numpy as np
import pytest

from arcflow_runtime import Pipeline, RequestError
from arcflow_runtime.generate import denoise
from arcflow_runtime.generate.previews import preview_steps
from tests.conftest import FAMILIES

PROMPTS = ["a red circle", "an old sailor in a dark rainy street at night"]
SIZE = {"height": 64, "width": 48}


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request, bundles):
    with Pipeline.load(bundles(request.param, steps=(2, 1, 4))) as pipe:
        yield pipe


def previews(pipe, **arguments):
    """The output of a call and its previews."""
    found = []
    given = SIZE | {"seed": [1, 2], "output_type": "latents"} | arguments
    output = pipe(PROMPTS, callback_on_preview=lambda step, images: found.append((step, images)), **given)
    return output, found


def integrate(latents, means, logweights, loggammas, sigma):
    """x at sigma 0 in float64, and the sum of the sizes of its terms, by Gauss-Legendre quadrature of the velocity.

    With 32 nodes the rule is exact to float64's precision: over an interval of at most 1, the loggammas of a student
    stay far below the degree 63 up to which it integrates exactly.
    """
    k, channels = means.shape[2:]
    means = means.astype(np.float64)
    weights = np.exp(logweights - logweights.max(axis=2, keepdims=True), dtype=np.float64)
    weights /= weights.sum(axis=2, keepdims=True)
    gammas = np.concatenate([np.zeros_like(loggammas[:, :, :1]), loggammas], axis=2).astype(np.float64)
    nodes, areas = np.polynomial.legendre.leggauss(32)
    coefficients = np.zeros_like(weights)
    for node, area in zip(sigma * (nodes + 1) / 2, sigma * areas / 2, strict=True):
        coefficients += area * weights * np.exp(gammas * (sigma - node))
    # Channel c * P + p takes the weight of sub-pixel p.
    terms = means * np.tile(coefficients, channels // logweights.shape[-1])
    return latents.astype(np.float64) - terms.sum(axis=2), np.abs(latents) + np.abs(terms).sum(axis=2), k


@pytest.mark.parametrize("steps", [2, 4])
def test_against_float64(pipe, monkeypatch, steps):
    calls = []
    update = denoise.update

    def record(latents, means, logweights, loggammas, sigma_src, sigma_start, sigma_end):
        assert sigma_src == sigma_start
        if sigma_end == 0.0:
            calls.append((latents, means, logweights, loggammas, sigma_src))
        return update(latents, means, logweights, loggammas, sigma_src, sigma_start, sigma_end)

    monkeypatch.setattr(denoise, "update", record)
    pipe(PROMPTS[0], seed=1, num_inference_steps=steps, output_type="latents", **SIZE)
    assert len(calls) == 1, "without a preview, only the last step ends at sigma 0"
    calls.clear()
    found = []
    pipe(
        PROMPTS[0],
        seed=1,
        num_inference_steps=steps,
        output_type="latents",
        callback_on_preview=lambda step, latents: found.append((step, latents)),
        **SIZE,
    )
    assert [step for step, _ in found] == list(range(steps - 1))
    assert len(calls) == steps
    for (_, preview), call in zip(found, calls, strict=False):
        expected, size, modes = integrate(*call)
        # In float32: each coefficient is rounded once, each product once, and K terms and the latents are summed with
        # K roundings, each by at most half an ulp of a partial sum, which is at most the sum of all sizes.
        bound = (modes + 2) * 2.0**-24 * size
        assert (np.abs(preview - expected) <= bound).all()


def test_the_first_preview_is_the_image_of_one_step(pipe):
    """The heads are the same, and so is the interval: from the first sigma to 0."""
    _, ((step, preview),) = previews(pipe)
    assert step == 0
    one = pipe(PROMPTS, seed=[1, 2], num_inference_steps=1, output_type="latents", **SIZE)
    # The conditioner computes all steps at once, and matrix products of other sizes may sum in another order.
    np.testing.assert_allclose(preview, one.images, rtol=0, atol=1e-5 * np.abs(one.images).max())


def test_images_are_the_same_with_and_without(pipe):
    output, _ = previews(pipe)
    np.testing.assert_array_equal(output.images, pipe(PROMPTS, seed=[1, 2], output_type="latents", **SIZE).images)


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [
        (2, None, [0]),
        (4, 3, [0, 1, 2]),
        (4, 1, [1]),
        (5, 3, [0, 1, 2]),
        (50, 1, [24]),
        (50, 3, [11, 24, 36]),
        (8, 0, []),
        (1, 3, []),
    ],
)
def test_previews_are_spread_over_the_steps(steps, most, expected):
    assert sorted(preview_steps(steps, most)) == expected


def test_fewer_previews_are_some_of_all(pipe):
    _, every = previews(pipe, num_inference_steps=4)
    _, one = previews(pipe, num_inference_steps=4, max_previews=1)
    assert [step for step, _ in one] == [1]
    np.testing.assert_array_equal(one[0][1], every[1][1])
    for wrong in (-1, True, 1.0):
        with pytest.raises(RequestError) as e:
            previews(pipe, max_previews=wrong)
        assert str(e.value) == f"max_previews must be an integer of at least 0, or None for all, got {wrong!r}"
    with pytest.raises(RequestError, match=r"^max_previews needs callback_on_preview; give both, or leave it out$"):
        pipe(PROMPTS, max_previews=1, **SIZE)


def test_one_step_has_no_preview(pipe):
    output, found = previews(pipe, num_inference_steps=1)
    assert found == []
    assert "preview" not in output.timings_ms


def test_a_preview_has_a_time_of_its_own(pipe):
    """It is not counted as a part of decoding."""
    output, _ = previews(pipe)
    assert output.timings_ms["preview"] > 0
    assert "decode" not in output.timings_ms, "latents are not decoded"
    assert "decode" in previews(pipe, output_type="pil")[0].timings_ms


def test_previews_of_pil(pipe):
    _, ((_, images),) = previews(pipe, output_type="pil")
    assert [image.size for image in images] == [(48, 64)] * 2


def test_a_preview_is_read_only_and_cannot_call_the_pipeline(pipe):
    said = []

    def on_preview(step, latents):
        assert not latents.flags.writeable
        with pytest.raises(RequestError) as error:
            pipe("x", **SIZE)
        said.append(str(error.value))

    pipe("x", callback_on_preview=on_preview, output_type="latents", **SIZE)
    assert said == [
        "a pipeline must not be called by a callback on the pipeline that called it; "
        "call it after the pipeline has returned, or use another pipeline"
    ]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (3, "callback_on_preview must be a function, got 3"),
        (
            lambda images: None,
            "callback_on_preview must take the step and the images, got a function of (images): diffusers' arguments "
            "(pipe, step, timestep, kwargs) are not passed, since a callback cannot replace the latents",
        ),
    ],
)
def test_callbacks_that_are_refused(pipe, callback, message):
    with pytest.raises(RequestError) as error:
        pipe("x", callback_on_preview=callback)
    assert str(error.value) == message
