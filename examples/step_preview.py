"""Report progress after each step and write a rough grey preview of the latents.

python step_preview.py BUNDLE FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from arcflow_runtime import Pipeline

HEIGHT, WIDTH = 64, 64  # in pixels; what the shapes student was trained for
bundle, folder = Path(sys.argv[1]), Path(sys.argv[2])


def on_step(step: int, latents: np.ndarray) -> None:
    """Write a preview of the first image; latents [B, N, 64] are read-only."""
    # A token is 16 x 16 pixels: 16 channels of 2 x 2 sub-pixels.
    tokens = latents[0].reshape(HEIGHT // 16, WIDTH // 16, 16, 2, 2)
    grey = tokens.mean(axis=2).transpose(0, 2, 1, 3).reshape(HEIGHT // 8, WIDTH // 8)
    scaled = 255 * (grey - grey.min()) / np.ptp(grey)
    Image.fromarray(scaled.astype(np.uint8)).resize((WIDTH, HEIGHT)).save(folder / f"step-{step}.png")
    print(f"step {step} is done")


with Pipeline.load(bundle) as pipe:
    output = pipe("a red heart", HEIGHT, WIDTH, seed=7, callback_on_step_end=on_step)
output.images[0].save(folder / "final.png")
