"""Statistics in float64 numpy: bootstrap 95 % intervals and the Frechet distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def resample(count: int, times: int, seed: int) -> np.ndarray:
    """Draw `times` bootstrap resamples of `count` indices, with replacement: int64 [times, count]."""
    return np.random.default_rng(seed).integers(count, size=(times, count))


def mean_interval(values: np.ndarray, draws: np.ndarray) -> Interval:
    """The mean of values [n] and the 2.5 and 97.5 percentiles of the means over draws [R, n]."""
    values = np.asarray(values, np.float64)
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high))


def normal_interval(value: float, replicates: np.ndarray) -> Interval:
    """`value` plus and minus 1.96 standard errors of the bootstrap replicates [R].

    For estimates with a small-sample bias. Resampling adds the bias again, so percentiles would lie to one side of
    `value`.
    """
    error = 1.959964 * float(np.std(replicates, ddof=1))
    return Interval(value, value - error, value + error)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of features [n, D], n >= 2."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Dowson and Landau 1982. Applied to a network's features it is the formula of FID. Covariances may be singular.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_replicates(features: np.ndarray, real: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Frechet distances [R] of features from real features, [n, D] each, both resampled by the same draws [R, n]."""
    return np.array([frechet(*moments(features[rows]), *moments(real[rows])) for rows in draws])
