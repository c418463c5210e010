from itertools import pairwise

import numpy as np
import pytest
from fake_bundle import GOLDEN
from safetensors.numpy import load_file

from arcflow_runtime.maths.update import update, velocity

pytestmark = pytest.mark.usefixtures("both_ways")

EPS = 2.0**-24  # half a unit in the last place of float32


def heads(rng, b=2, n=5, k=16, c=16, p=4, spread=20.0):
    loggammas = rng.uniform(-spread, spread, (b, n, k - 1, p)).astype(np.float32)
    loggammas[rng.random(loggammas.shape) < 0.2] = 0
    tiny = rng.random(loggammas.shape) < 0.1
    loggammas[tiny] = (rng.standard_normal(tiny.sum()) * 10.0 ** rng.uniform(-30, -3, tiny.sum())).astype("f4")
    return (
        rng.standard_normal((b, n, c * p)).astype(np.float32),
        rng.standard_normal((b, n, k, c * p)).astype(np.float32),
        (rng.standard_normal((b, n, k, p)) * 4).astype(np.float32),
        loggammas,
    )


def terms(means, logweights, loggammas, factor):
    """w_k mean_k factor(loggamma_k) per mode in float64, [B, N, K, C*P]."""
    means, logweights = means.astype(np.float64), logweights.astype(np.float64)
    w = np.exp(logweights - logweights.max(2, keepdims=True))
    w /= w.sum(2, keepdims=True)
    g = np.concatenate([np.zeros_like(w[:, :, :1]), loggammas.astype(np.float64)], axis=2)
    return means * np.tile(w * factor(g), (1, 1, 1, means.shape[-1] // w.shape[-1]))


def phi(z):
    # A series below 1e-5, where its fourth term is under 1e-16, and expm1 above: not the code under test.
    series = 1 + z / 2 + z * z / 6
    return np.where(np.abs(z) < 1e-5, series, np.expm1(z) / np.where(z == 0, 1, z))


@pytest.mark.parametrize(
    ("s", "a", "e"),
    [
        (1, 1, 0),
        (1, 1, 0.7619),
        (0.7619, 0.7619, 0),
        (1, 0.9, 0.3),
        (1, 0.5, 0.5),
        (0.3, 0.2, 0.1999),
        (1, 1e-3, 0),
    ],
)
def test_update_agrees_with_float64(s, a, e):
    latents, *rest = heads(np.random.default_rng(1))
    ours = update(latents, *rest, s, a, e)
    assert ours.dtype == np.float32
    each = terms(*rest, lambda g: np.exp(g * (s - a)) * phi(g * (a - e)) * (a - e))
    exact = latents.astype(np.float64) - each.sum(2)
    # The coefficient is rounded once (1 EPS), its product once (1), the sum of K terms K - 1 times, in any
    # order, each against the sum of magnitudes; the last subtraction rounds the result once. Float64's own
    # errors vanish.
    bound = (16 + 2) * EPS * np.abs(each).sum(2) + EPS * np.abs(exact)
    assert (np.abs(ours - exact) <= bound).all()


@pytest.mark.parametrize(("s", "sigma"), [(1, 1), (1, 0), (0.7, 0.3)])
def test_velocity_agrees_with_float64(s, sigma):
    _, *rest = heads(np.random.default_rng(2))
    each = terms(*rest, lambda g: np.exp(g * (s - sigma)))
    ours = velocity(*rest, s, sigma)
    assert (np.abs(ours - each.sum(2)) <= (16 + 2) * EPS * np.abs(each).sum(2)).all()


def test_sub_intervals_add_up():
    latents, *rest = heads(np.random.default_rng(3), spread=3)
    whole = update(latents, *rest, 1, 1, 0)
    part = latents
    edges = np.linspace(1, 0, 6)
    for a, e in pairwise(edges):
        part = update(part, *rest, 1, a, e)
    # Five intervals of at most e**3 * the means, each with the rounding above.
    size = terms(*rest, lambda g: np.exp(np.maximum(g, 0)))
    assert (np.abs(part - whole) <= 6 * (16 + 3) * EPS * (np.abs(size).sum(2) + np.abs(latents))).all()


def test_no_gammas_is_an_euler_step():
    latents, means, logweights, loggammas = heads(np.random.default_rng(4))
    zero = np.zeros_like(loggammas)
    v = velocity(means, logweights, zero, 1, 0.5)
    # The product step * v is rounded inside or outside the sum, and both sums differ by their rounding.
    np.testing.assert_allclose(
        update(latents, means, logweights, zero, 1, 1, 0.75), latents - np.float32(0.25) * v, atol=60 * EPS
    )


def test_update_leaves_its_inputs_alone():
    arrays = heads(np.random.default_rng(5))
    copies = [x.copy() for x in arrays]
    update(*arrays, 1, 1, 0)
    for x, y in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, y)


def test_large_logits_do_not_overflow():
    latents, means, logweights, loggammas = heads(np.random.default_rng(6))
    np.testing.assert_allclose(
        update(latents, means, logweights + 1e4, loggammas, 1, 1, 0),
        update(latents, means, np.float32(1e4) + logweights - np.float32(0), loggammas, 1, 1, 0),
    )
    assert np.isfinite(update(latents, means, logweights * 1e4, loggammas, 1, 1, 0)).all()


@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_golden_steps(name):
    golden = load_file(GOLDEN / name / "case0.safetensors")
    edges = [1, 3.2 * 0.5 / 2.1, 0]
    latents = golden["noise"]
    for i in range(2):
        step = [golden[f"step{i}.{h}"] for h in ("means", "logweights", "loggammas")]
        ours = update(latents, *step, edges[i], edges[i], edges[i + 1])
        latents = golden[f"step{i}.latents"]
        # The reference clamps |z| to 1e-4 in phi, an error of up to 5e-5 of a mode's share.
        assert np.abs(ours - latents).max() <= 1e-4 * np.abs(latents).max()
