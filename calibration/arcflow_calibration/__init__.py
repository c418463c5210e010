"""Calibration: a student and prompts -> the ranges of its linears' activations, for FP8."""
