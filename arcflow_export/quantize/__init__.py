"""Quantise a bundle: put the linears that a policy names into FP8, with calibrated scales; `arcflow quantize`."""
