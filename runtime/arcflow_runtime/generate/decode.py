"""Decode: latents [B, N, 64] -> pixels [B, H, W, 3] uint8 -> images of the requested output type."""

from __future__ import annotations

import numpy as np
from PIL import Image

from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import EngineError


def decode_latents(parts: Parts, latents: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Run the VAE decoder.

    Args:
        parts: the bundle's parts.
        latents: [B, N, D] float32, packed, tokens in row-major order.
        height_px: height of the images.
        width_px: width of the images.

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


def check_not_flat(pixels: np.ndarray, precision: str) -> None:
    """Check for images [B, H, W, 3] of a single colour, which a float16 decoder gives when it overflows.

    Raises:
        EngineError: `precision` is float16 and an image has one colour; says which image and what to do.
    """
    if precision != "float16":
        return
    flat = [i for i, p in enumerate(pixels) if p.min() == p.max()]
    if flat:
        raise EngineError(
            f"vae_decoder: images {flat} must have more than one colour; "
            "float16 overflows in some decoders, "
            "export with --precision vae_decoder=float32"
        )


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """[B, H, W, 3] uint8 -> B RGB images."""
    _, height, width, _ = pixels.shape
    # The same as Image.fromarray, in half the time for a small image.
    return [Image.frombytes("RGB", (width, height), p) for p in np.ascontiguousarray(pixels)]


def to_float(pixels: np.ndarray) -> np.ndarray:
    """[B, H, W, 3] uint8 -> [B, H, W, 3] float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)
