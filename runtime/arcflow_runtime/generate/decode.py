"""Decode: latents [B, N, 64] -> pixels [B, H, W, 3] uint8 -> the pictures in the form asked for."""

from __future__ import annotations

import numpy as np
from PIL import Image

from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import EngineError


def decode_latents(parts: Parts, latents: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Run the VAE decoder.

    Args:
        parts: the bundle's parts.
        latents: [B, N, D] float32, packed, tokens row by row.
        height_px: the pictures' height.
        width_px: the pictures' width.

    Returns:
        [B, H, W, 3] uint8, RGB.

    Raises:
        EngineError: the decoder failed.
    """
    batch, tokens, channels = latents.shape
    token_px = round((height_px * width_px / tokens) ** 0.5)
    grid = latents.reshape(batch, height_px // token_px, width_px // token_px, channels)
    with parts.use("vae_decoder") as run:
        return run({"latents": grid})["images"]


def check_pictures(pixels: np.ndarray, precision: str) -> None:
    """Refuse the flat black pictures [B, H, W, 3] that a float16 decoder gives when it overflows.

    Raises:
        EngineError: names the pictures and what to do.
    """
    if precision != "float16":
        return
    flat = [i for i, p in enumerate(pixels) if p.min() == p.max()]
    if flat:
        raise EngineError(
            f"vae_decoder: pictures {flat} must have more than one colour; "
            "float16 overflows in some decoders, "
            "export with --precision vae_decoder=float32"
        )


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """[B, H, W, 3] uint8 -> B RGB pictures."""
    _, height, width, _ = pixels.shape
    # What Image.fromarray comes to, in half of its time for a small picture.
    return [Image.frombytes("RGB", (width, height), p) for p in np.ascontiguousarray(pixels)]


def to_float(pixels: np.ndarray) -> np.ndarray:
    """[B, H, W, 3] uint8 -> [B, H, W, 3] float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)
