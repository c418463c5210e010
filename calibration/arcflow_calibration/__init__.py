"""Calibration: measure the ranges of a student's activations over prompts; FP8 scales are made from them."""
