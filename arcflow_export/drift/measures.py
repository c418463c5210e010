"""Drift measures in float64: relative RMS error, PSNR and GMSD of each case, and means with 95 % intervals."""

from __future__ import annotations

import numpy as np

from arcflow_export.images.statistics import Interval, mean_interval, resample

#: Resamples of the prompts for 95 % intervals, and their seed.
RESAMPLES, SEED = 1000, 0
#: Mean squared errors are clipped to at least this, so that equal images have a PSNR of 100 dB.
_LEAST_ERROR = 1e-10
#: The constant of the gradient magnitude similarity for grey levels in [0, 255] (Xue et al. 2014, arXiv 1308.3052).
_GMSD_CONSTANT = 170.0


def relative_error(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """RMS of the difference over RMS of the reference for each row: two arrays [n, ...] -> [n]; Inf if not finite."""
    rows = len(reference)
    if reference[0].size == 0:  # a student with one mode has no gammas
        return np.zeros(rows)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.square(got.astype(np.float64) - reference).reshape(rows, -1).sum(1)
    return root_ratio(difference, np.square(reference, dtype=np.float64).reshape(rows, -1).sum(1))


def root_ratio(error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """sqrt(error / energy) for sums of squares [n]; 0 where both are 0, Inf where the error is not finite."""
    error, energy = error.astype(np.float64), energy.astype(np.float64)
    ratio = np.sqrt(np.where(np.isfinite(error), error, np.inf) / np.maximum(energy, 1e-60))
    return np.where(error == 0, 0.0, ratio)


def psnr_db(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of uint8 images [n, H, W, 3] in dB, [n]; 100 where they are equal."""
    error = np.square(got.astype(np.float64) - reference).reshape(len(got), -1).mean(1) / 255**2
    return -10 * np.log10(error.clip(min=_LEAST_ERROR))


def gmsd(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Gradient magnitude similarity deviation of uint8 images [n, H, W, 3]: [n], 0 for equal ones, below 0.5.

    Xue, Zhang, Mou and Bovik 2014. The grey images are halved in size. m is the length of the Prewitt gradient. The
    similarity at a pixel is (2 m m' + c) / (m^2 + m'^2 + c), and the result is its standard deviation over the image.
    GMSD needs no weights. Like LPIPS, it ignores small shifts of brightness and notices lost or invented edges.
    """
    a, b = (_gradient(_half(p.astype(np.float64) @ (0.299, 0.587, 0.114))) for p in (got, reference))
    similarity = (2 * a * b + _GMSD_CONSTANT) / (a**2 + b**2 + _GMSD_CONSTANT)
    return similarity.reshape(len(got), -1).std(1)


def mean(values: np.ndarray) -> Interval:
    """The mean of one value per prompt with its 95 % bootstrap interval; Inf if a value is not finite."""
    if not np.isfinite(values).all():
        return Interval(float("inf"), float("inf"), float("inf"))
    return mean_interval(values, resample(len(values), RESAMPLES, SEED))


def _half(grey: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels; [n, H, W] with even H and W."""
    n, h, w = grey.shape
    return grey.reshape(n, h // 2, 2, w // 2, 2).mean((2, 4))


def _gradient(grey: np.ndarray) -> np.ndarray:
    """Length of the Prewitt gradient; the image is padded by repeating its edges."""
    p = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (p[:, :-2] + p[:, 1:-1] + p[:, 2:]) / 3
    columns = (p[:, :, :-2] + p[:, :, 1:-1] + p[:, :, 2:]) / 3
    return np.hypot(rows[:, :, 2:] - rows[:, :, :-2], columns[:, 2:] - columns[:, :-2])
