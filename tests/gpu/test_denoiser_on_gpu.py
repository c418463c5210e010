"""The runtime's denoiser on a GPU around engines made of copies: steps against float64, replays against plain calls."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from arcflow_runtime.engines.denoiser import NegativeTexts
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.gpu.shapes import DenoiseShape, backbone_inputs, conditioner_inputs, output_shapes
from arcflow_runtime.maths.euler import euler
from arcflow_runtime.maths.noise import draw_latents
from tests.gpu.euler_cases import SCALE
from tests.gpu.euler_cases import exact as exact_guided
from tests.gpu.flux_bundle import TINY, flux_bundle, make_job
from tests.gpu.stand_in import CopyEngine, copied, open_denoiser
from tests.gpu.update_cases import exact

pytestmark = pytest.mark.gpu
TEXT_TOKENS = 16


@pytest.fixture(scope="module")
def bundle():
    return flux_bundle(TINY, "float32")


@pytest.fixture
def make_denoiser(device, bundle):
    """A function (bundle) that makes a denoiser; all are closed after the test."""
    made = []

    def make(bundle=bundle):
        made.append(open_denoiser(device, bundle, lambda part: CopyEngine(bundle.manifest, part)))
        return made[-1][0]

    yield make
    for denoiser, parts in made:
        denoiser.close()
        parts.close()


@pytest.fixture
def denoiser(make_denoiser):
    return make_denoiser()


def outputs_of(bundle, job, latents, step, negative=None):
    """The backbone's outputs at one step in numpy, from the latents [B, N, C] before it.

    `negative` are texts in the place of the job's.
    """
    m, texts = bundle.manifest, job.texts
    size = DenoiseShape(len(texts), job.grid, TEXT_TOKENS, len(job.timesteps))
    conditioner = {
        "timesteps": job.timesteps,
        "pooled_projections": np.concatenate([text.pooled for text in texts]),
    }
    shapes = output_shapes(m, "conditioner", conditioner_inputs(m, size.batch, size.steps))
    modulation = copied("conditioner", conditioner, shapes)["modulation"]
    inputs = {
        "latents": latents,
        "modulation": modulation[step],
        "encoder_hidden_states": np.concatenate([text.states for text in negative or texts]),
    }
    return copied("backbone", inputs, output_shapes(m, "backbone", backbone_inputs(m, size)))


def heads_of(bundle, job, latents, step):
    """The heads [T, K, *] of one step in numpy, from the latents [B, N, C] before it."""
    made = outputs_of(bundle, job, latents, step)
    return [made[name].reshape(-1, *made[name].shape[2:]) for name in ("means", "logweights", "loggammas")]


@pytest.mark.parametrize("seeds", [(5,), (5, 6)])
def test_each_step_agrees_with_float64(denoiser, bundle, seeds, sized, record_property):
    size_px = sized(1024, 64)
    job = make_job(bundle, size_px, TEXT_TOKENS, seeds)
    after = []
    result = denoiser.denoise(job, Stopwatch(), lambda step, latents: after.append(latents))
    latents = draw_latents(list(seeds), len(seeds), 16, size_px // 8, size_px // 8, 2)
    worst = 0.0
    for step, found in enumerate(after):
        start = latents.reshape(-1, latents.shape[-1])
        expected, bound = exact(start, *heads_of(bundle, job, latents, step), job.sigmas[step], job.sigmas[step + 1])
        error = np.abs(found.reshape(start.shape) - expected)
        assert (error <= bound).all(), f"step {step}"
        worst = max(worst, float((error / bound).max()))
        latents = found
    record_property("largest error as a fraction of its bound", worst)
    assert len(after) == len(job.timesteps)
    np.testing.assert_array_equal(result.latents, after[-1])


def test_a_replay_gives_the_bits_of_plain_calls(denoiser, make_denoiser, bundle, sized):
    """The first call of a shape is plain, the second captures, later ones replay; other requests come between.

    The replay of another prompt is compared with the plain call of a denoiser that has seen no other.
    """
    size_px = sized(1024, 64)
    one, two = (make_job(bundle, size_px, TEXT_TOKENS, (seed,)) for seed in (7, 8))
    smaller = make_job(bundle, size_px // 2, TEXT_TOKENS, (9,))
    plain = denoiser.denoise(one, Stopwatch()).latents
    found = {"captured": denoiser.denoise(one, Stopwatch()).latents}
    other = denoiser.denoise(two, Stopwatch()).latents
    np.testing.assert_array_equal(other, make_denoiser().denoise(two, Stopwatch()).latents)
    found["replayed after another prompt"] = denoiser.denoise(one, Stopwatch()).latents
    for _ in range(2):
        denoiser.denoise(smaller, Stopwatch())
    found["replayed after another size"] = denoiser.denoise(one, Stopwatch()).latents
    assert [(plan.graph is not None, plan.obstacle) for plan in denoiser._plans.values()] == [(True, None)] * 2
    assert (other != plain).mean() > 0.99
    for name, latents in found.items():
        np.testing.assert_array_equal(latents, plain, err_msg=name)


@pytest.mark.parametrize("negative_tokens", [None, TEXT_TOKENS, 5])
def test_a_straight_students_steps(negative_tokens, make_denoiser, sized):
    """Each has the bits of the Python runtime, or with guidance agrees with float64; a replay has those of plain calls.

    The negative texts have the length of the texts, or another.
    """
    bundle, size_px = flux_bundle(TINY, "float32", "linear"), sized(1024, 64)
    denoiser, job = make_denoiser(bundle), make_job(bundle, size_px, TEXT_TOKENS, (5, 6), steps=3)
    away = None
    if negative_tokens is not None:
        other = make_job(bundle, size_px, negative_tokens, (7, 8))
        away, rotary = other.texts, other.text_rotary
        job = dataclasses.replace(job, negative=NegativeTexts(away, rotary, SCALE))
    after = []
    result = denoiser.denoise(job, Stopwatch(), lambda step, latents: after.append(latents)).latents
    latents = draw_latents([5, 6], 2, 16, size_px // 8, size_px // 8, 2)
    for step, found in enumerate(after):
        length = job.sigmas[step] - job.sigmas[step + 1]
        velocity = outputs_of(bundle, job, latents, step)["velocity"]
        if away is None:
            np.testing.assert_array_equal(found, euler(latents, velocity, length))
        else:
            negative = outputs_of(bundle, job, latents, step, away)["velocity"]
            tokens = [x.reshape(-1, x.shape[-1]) for x in (latents, velocity, negative)]
            expected, bound = exact_guided(*tokens, length)
            assert (np.abs(found.reshape(expected.shape) - expected) <= bound).all(), f"step {step}"
        latents = found
    assert len(after) == 3
    for _ in range(3):
        np.testing.assert_array_equal(denoiser.denoise(job, Stopwatch()).latents, result)
    (plan,) = denoiser._plans.values()
    assert (plan.graph is not None, plan.obstacle) == (True, None)
