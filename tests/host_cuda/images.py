"""What the cases generate, and how close to the CPU's images the result must be."""

from __future__ import annotations

import numpy as np

from arcflow_runtime import EngineError

#: The same graphs run with ONNX Runtime on both sides, image by image. Only the conditioner's batch differs: it runs
#: per prompt on the CPU and per image on the device. Another batch sums in another order, a few units of 2^-24 per
#: layer.
CLOSE = {"rtol": 0, "atol": 2e-5}
PROMPTS = ("a red circle", "a much longer prompt about a blue square on a green background")
WITHOUT_GRAPH = "images are generated without a CUDA graph: "


def generate(pipe, prompt=PROMPTS[0], **arguments):
    """The images of one call; the defaults are small."""
    defaults = {"height": 32, "width": 48, "seed": 3, "output_type": "latents", "max_sequence_length": 16}
    return pipe(prompt, **(defaults | arguments)).images


def attempt(make, expected):
    """Call `make` for an image: the message of its error, or None if it succeeded; then the image must be right."""
    try:
        found = make()
    except EngineError as e:
        return str(e)
    np.testing.assert_allclose(found, expected, **CLOSE)
    return None


def levels(images):
    """PIL images as integers, [B, H, W, 3]."""
    return np.stack([np.asarray(image) for image in images]).astype(int)
