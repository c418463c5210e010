"""Encoded images against Pillow's reader: pixels, and the text in a PNG."""

from __future__ import annotations

import io

import fpng
import numpy as np
import pytest
from PIL import Image

from arcflow_serve import encode_image
from arcflow_serve.encode_image import Encoding

TEXT = {"prompt": "ein rot-grüner Kreis \U0001f534", "seed": "1", "steps": "2"}


@pytest.fixture(params=["fpng", "Pillow"])
def writer(request, monkeypatch) -> str:
    assert encode_image.fpng is fpng
    if request.param == "Pillow":
        monkeypatch.setattr(encode_image, "fpng", None)
    return request.param


def picture(width: int, height: int, kind: str) -> np.ndarray:
    """[H, W, 3] uint8."""
    if kind == "noise":
        return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([across, down, across + down], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (16, 272), (336, 48), (1, 1)])
def test_a_png_has_every_pixel_and_its_text(writer, width, height, kind):
    pixels = picture(width, height, kind)
    image = Image.open(io.BytesIO(Encoding().encode(Image.fromarray(pixels), TEXT)))
    assert (image.format, image.mode, image.text) == ("PNG", "RGB", TEXT)
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(kind):
    pixels = picture(64, 48, "smooth")
    image = Image.open(io.BytesIO(Encoding(kind, 90).encode(Image.fromarray(pixels), TEXT)))
    assert (image.format, image.size) == (kind.upper(), (64, 48))
