"""Decide before loading whether a student's weights must stay on disk during calibration, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from arcflow_calibration.options import CalibrationSettings
from arcflow_export.errors import CalibrationError
from arcflow_export.options import PARTS
from arcflow_export.student.load import Student
from arcflow_export.student.memory import GIB, added_bytes, free_bytes, stays_on_disk, weight_bytes

#: Values in memory at once for one token, in units of the transformer's width. In a single block of FLUX: input and
#: output (2), the MLP before and after its activation (4 each), q, k, v before and after the rotation (6), the
#: concatenated input of the last linear (5), and its absolute value for the calibrator (5).
_WIDTHS = 26
#: Unused weights of Qwen-Image's text encoder: only its language model is used, up to the hidden states.
_UNUSED = ("visual.", "model.visual.", "lm_head.")


@dataclass(frozen=True)
class Footprint:
    """Memory and disk traffic of a calibration, in bytes.

    `weights`: all weights in memory. `least`: the smallest memory that is enough, with weights on disk. Then `read` is
    read from disk for each network call, and `read_text` for each batch of prompts.
    """

    weights: int
    least: int
    read: int
    read_text: int


def plan_memory(student: Student, settings: CalibrationSettings) -> tuple[bool, str | None]:
    """Decide whether the base's weights stay on disk; if so, also return a sentence with the reason and cost.

    Raises:
        CalibrationError: even one layer at a time does not fit; the message says what is needed, what is free, and what
            to do.
    """
    footprint, free = measure(student, settings), free_bytes(settings.device)
    if not stays_on_disk(footprint.weights, free):
        return False, None
    if footprint.least > free:
        smaller = "--dtype bfloat16 or " if settings.dtype == "float32" else ""
        raise CalibrationError(
            f"calibration needs at least {_gib(footprint.least)} of memory in {settings.dtype}, even with one layer in "
            f"memory at a time, {_gib(free)} are free; give {smaller}smaller --sizes or --batch, or calibrate on a "
            "machine with more memory: scales.json is small and can be used on any machine"
        )
    return True, (
        f"the student's weights need {_gib(footprint.weights)} of memory in {settings.dtype}, {_gib(free)} are free: "
        f"they are read from disk as they are used, {_gib(footprint.read)} per network call and "
        f"{_gib(footprint.read_text)} per batch of prompts"
    )


def measure(student: Student, settings: CalibrationSettings) -> Footprint:
    """Compute the footprint of a calibration, from file headers and settings alone."""
    dtype = getattr(torch, settings.dtype)
    dtypes = dict.fromkeys(PARTS, dtype)
    vae = sum(ref.numel for ref in student.indexes["vae"].values()) * dtype.itemsize
    streamed = [
        ref
        for name, index in student.indexes.items()
        if name != "vae"
        for key, ref in index.items()
        if not key.startswith(_UNUSED)
    ]
    # The stored tensor is mapped while it is cast.
    largest = max(ref.numel * (dtype.itemsize + ref.dtype.itemsize) for ref in streamed)
    config = student.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = max(h // 16 * (w // 16) for h, w in settings.sizes) + settings.max_sequence_length
    activations = settings.batch * tokens * width * _WIDTHS * dtype.itemsize
    read = sum(ref.num_bytes for ref in student.indexes["transformer"].values())
    return Footprint(
        weights=weight_bytes(student, dtypes),
        least=added_bytes(student, dtypes) + vae + largest + activations,
        read=read,
        read_text=sum(ref.num_bytes for ref in streamed) - read,
    )


def _gib(value: int) -> str:
    return f"{value / GIB:.1f} GiB"
