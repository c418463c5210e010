"""The reference implementation's images of the golden students: requests and arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str, index: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Case `index` of a student, and what the reference computed: noise, the latents of each step, the image."""
    case = json.loads((GOLDEN / name / "cases.json").read_text())[index]
    return case, load_file(GOLDEN / name / f"case{index}.safetensors")


def arguments(case: dict) -> dict:
    """The arguments of a pipeline's call for a case."""
    guidance = {"guidance_scale": case["guidance_scale"]} if "guidance_scale" in case else {}
    names = ("prompt", "height", "width", "seed", "max_sequence_length")
    return {n: case[n] for n in names} | {"num_inference_steps": case["nfe"]} | guidance


def check_case(reference: dict[str, np.ndarray], steps: list[np.ndarray], image: np.ndarray) -> None:
    """Check latents after each step, and the image [1, H, W, 3] float32, against the reference.

    The bound is the project's contract: latents within 1e-4 of the largest reference value, images within 1.5 grey
    levels, because the reference's float image is rounded once to 8 bits, which is half a level.
    """
    for i, latents in enumerate(steps):
        expected = reference[f"step{i}.latents"]
        assert np.abs(latents - expected).max() <= 1e-4 * np.abs(expected).max(), f"step {i}"
    assert np.abs(image - reference["image"].transpose(0, 2, 3, 1)).max() <= 1.5 / 255
