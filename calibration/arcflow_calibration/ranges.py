"""Calibrators: the range of one linear's input at one step. They make modelopt's calibrators resumable.

nvidia-modelopt 0.47's histogram calibrator was made for integers. Three things in it are wrong for our use:

1. It counts in float32 and reads the counts as int32, so a bin stops at 2^24 values per call and wraps at 2^31 in
   total. FLUX has 5 10^7 activations per linear and prompt. Here calls are split, and counts are kept in int64.
2. Its number of bins grows with the range without bound. Here the number is fixed: if the range must grow, it doubles,
   and pairs of bins are merged.
3. Its percentile is the lower edge of a bin, which is 0 if one value is 2048 times the others. Its search for the least
   squared error raises TypeError for E4M3. Here the upper edge is used, and modelopt's other search, MseCalibrator,
   runs on the centres of the bins, weighted by their counts.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch

from arcflow_export.errors import CalibrationError
from arcflow_export.formats.scales import Method

with warnings.catch_warnings():  # modelopt warns about every newer version of transformers
    warnings.simplefilter("ignore", UserWarning)
    from modelopt.torch.quantization.calib import HistogramCalibrator, MaxCalibrator
    from modelopt.torch.quantization.calib.mse import MseCalibrator
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

E4M3 = (4, 3)
BINS = 4096
#: float32 counts integers exactly up to here.
_EXACT = 1 << 24
#: The search of --method mse: it clips to shares of the largest value from _LEAST to 1, in steps of _STEP.
_LEAST, _STEP = 1 / 16, 1 / 512


class Calibrator(Protocol):
    """Collects a range: `peak` is the largest |value|, `counts` [BINS] int64 a histogram of |value| over [0, span]."""

    peak: float
    counts: torch.Tensor | None
    span: float

    def restore(self, peak: float, counts: torch.Tensor | None, span: float) -> None:
        """Continue from the saved values of a calibrator."""

    def amax(self) -> float:
        """The range by the calibrator's method."""


def make_calibrator(layer: str, method: Method, percentile: float | None) -> Calibrator:
    """A calibrator for one linear, named `layer` in messages, at one step."""
    return _Max(layer) if method == "max" else _Histogram(layer, percentile)


class _Max(MaxCalibrator):
    """Collects the largest absolute value."""

    _calib_amax: torch.Tensor | None
    counts: torch.Tensor | None = None
    span = 0.0

    def __init__(self, layer: str):
        super().__init__(num_bits=E4M3, axis=None)
        self._layer = layer

    def collect(self, x: torch.Tensor) -> None:
        """Add activations of any shape.

        Raises:
            CalibrationError: an activation is NaN or Inf.
        """
        _largest(x, self._layer)
        if self._calib_amax is not None:
            self._calib_amax = self._calib_amax.to(x.device)  # a restored value is on the host
        super().collect(x)

    @property
    def peak(self) -> float:
        """The largest |value|, or 0 if nothing was collected."""
        return 0.0 if self._calib_amax is None else float(self._calib_amax)

    def restore(self, peak: float, counts: torch.Tensor | None, span: float) -> None:
        """Continue from `peak`."""
        self._calib_amax = torch.tensor(peak)

    def amax(self) -> float:
        """The largest |value|."""
        return float(self.compute_amax())


class _Histogram(HistogramCalibrator):
    """A histogram of absolute values over [0, span]; the method is percentile, or mse if `percentile` is None."""

    #: modelopt collects into tensors, but reads numpy arrays.
    _calib_hist: Any
    _calib_bin_edges: Any

    def __init__(self, layer: str, percentile: float | None):
        super().__init__(num_bits=E4M3, axis=None, num_bins=BINS)
        self._layer, self._percentile = layer, percentile
        self.peak, self.span = 0.0, 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def collect(self, x: torch.Tensor) -> None:
        """Add activations of any shape.

        Raises:
            CalibrationError: an activation is NaN or Inf.
        """
        peak = _largest(x, self._layer)
        if self.span == 0:
            if peak == 0:
                self.counts[0] += x.numel()
                return
            self.span = peak
        while peak > self.span:
            self.counts = torch.cat([self.counts.unflatten(0, (-1, 2)).sum(1), self.counts.new_zeros(BINS // 2)])
            self.span *= 2
        self.peak = max(self.peak, peak)
        self._calib_bin_edges = torch.linspace(0, self.span, BINS + 1, device=x.device)
        for part in x.reshape(-1).split(_EXACT):
            self._calib_hist = torch.zeros(BINS, device=x.device)
            super().collect(part)
            self.counts += self._calib_hist.long().cpu()

    def restore(self, peak: float, counts: torch.Tensor | None, span: float) -> None:
        """Continue from the saved values of a calibrator."""
        assert counts is not None
        self.peak, self.counts, self.span = peak, counts.clone(), span

    def amax(self) -> float:
        """The range, by percentile or by least squared error; at most the largest |value|."""
        edges = torch.linspace(0, self.span, BINS + 1, dtype=torch.float64)
        if self._percentile is None:
            return min(self.peak, _least_error(self.counts, edges, self.peak))
        # modelopt converts tensors to int32, but uses numpy arrays unchanged.
        self._calib_hist, self._calib_bin_edges = self.counts.numpy(), edges.numpy()
        lower = float(self.compute_amax("percentile", percentile=self._percentile))
        return min(self.peak, lower + self.span / BINS)


def _least_error(counts: torch.Tensor, edges: torch.Tensor, peak: float) -> float:
    """The range up to `peak` that gives the least squared error in E4M3, for values at the centres of the bins."""
    weights = counts.double()
    search = MseCalibrator(
        torch.tensor(peak),
        step_size=_STEP,
        start_multiplier=_LEAST,
        stop_multiplier=1.0,
        quant_func=scaled_e4m3_impl,
        error_func=lambda x, xq: weights * (x.double() - xq.double()).square(),
    )
    search.collect((edges[1:] + edges[:-1]) / 2)
    return float(search.compute_amax())


def _largest(x: torch.Tensor, layer: str) -> float:
    value = float(x.abs().amax())
    if not value < float("inf"):
        raise CalibrationError(
            f"{layer}: its input holds {'NaN' if value != value else 'Inf'}; the student is broken in this dtype, "
            "try --dtype float32"
        )
    return value
