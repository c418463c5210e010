"""Lay out images and their prompts on one contact sheet, for `arcflow generate --sheet`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

#: Smaller images are enlarged by an integer factor, up to this many pixels on their longer side.
CELL_PX = 256
_GAP_PX, _FONT_PX, _PAPER, _INK = 12, 14, (255, 255, 255), (60, 60, 66)


def make_sheet(images: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """Lay out images of one size on a roughly square sheet, each with its prompt beneath.

    Args:
        images: RGB images of the same size.
        prompts: one per image.
    """
    factor = max(1, CELL_PX // max(images[0].size))
    width, height = (side * factor for side in images[0].size)
    columns = min(len(images), max(2, math.ceil(math.sqrt(len(images) * height / width))))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(_FONT_PX)
    captions = [_wrap(prompt, width, font) for prompt in prompts]
    line = round(_FONT_PX * 1.3)
    text_height = line * max(len(c) for c in captions)
    step_x, step_y = width + _GAP_PX, height + text_height + 2 * _GAP_PX
    sheet = Image.new("RGB", (columns * step_x + _GAP_PX, rows * step_y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _GAP_PX + i % columns * step_x, _GAP_PX + i // columns * step_y
        sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        for row, text in enumerate(caption):
            draw.text((x, y + height + _GAP_PX // 2 + row * line), text, fill=_INK, font=font)
    return sheet


def _wrap(prompt: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break `prompt` into lines that fit `width` pixels, at most three."""
    characters = max(8, int(width / font.getlength("a typical prompt") * len("a typical prompt")))
    return textwrap.wrap(prompt, characters, max_lines=3, placeholder=" …") or [""]
