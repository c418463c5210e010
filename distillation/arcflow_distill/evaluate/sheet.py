"""Make the contact sheet of an evaluation: one image with a row per caption and a column per sampler."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

#: Sizes in pixels: an image after enlarging by `SCALE`, gaps, margins, the captions' column and the lines of headings.
SCALE, GAP, MARGIN, CAPTION, HEADING, TITLE = 2, 8, 24, 216, 44, 34
_INK, _FAINT, _PAPER = (32, 33, 36), (112, 117, 122), (255, 255, 255)


@dataclass(frozen=True)
class Section:
    """Rows under one title: captions [R], and by column their images [R, H, W, 3] uint8."""

    title: str
    captions: Sequence[str]
    columns: Mapping[str, np.ndarray]


def contact_sheet(sections: Sequence[Section]) -> Image.Image:
    """Lay out the sections below each other. All have the same columns; a column's name may contain a line break."""
    names = list(sections[0].columns)
    side = SCALE * sections[0].columns[names[0]].shape[1]
    sheet = Image.new("RGB", sheet_size(sections, side), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = [MARGIN + CAPTION + i * (side + GAP) for i in range(len(names))]
    for x, name in zip(left, names, strict=True):
        center = (x + side / 2, MARGIN + HEADING / 2 - 2)
        draw.multiline_text(center, name, _INK, _font(14, bold=True), anchor="mm", align="center", spacing=3)
    y = MARGIN + HEADING
    for section in sections:
        draw.text((MARGIN, y + TITLE / 2), section.title, _FAINT, _font(14), anchor="lm")
        y += TITLE
        for row, caption in enumerate(section.captions):
            lines = "\n".join(textwrap.wrap(caption, 24))
            draw.multiline_text((MARGIN, y + side / 2), lines, _INK, _font(14), anchor="lm", spacing=5)
            for x, name in zip(left, names, strict=True):
                image = Image.fromarray(section.columns[name][row])
                sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
            y += side + GAP
    return sheet


def sheet_size(sections: Sequence[Section], side: int) -> tuple[int, int]:
    """Width and height of the sheet in pixels, for images that are `side` pixels wide after enlarging."""
    columns, rows = len(sections[0].columns), sum(len(s.captions) for s in sections)
    width = 2 * MARGIN + CAPTION + columns * (side + GAP) - GAP
    return width, 2 * MARGIN + HEADING + len(sections) * TITLE + rows * (side + GAP) - GAP


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
