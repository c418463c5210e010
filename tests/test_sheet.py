"""Sheets of pictures with their prompts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from arcflow_runtime.generate.sheet import CELL_PX, make_sheet


def picture(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_every_picture_is_there_above_its_prompt():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    sheet = np.asarray(make_sheet([picture(c) for c in colors], ["a red one", "green", "", "yellow"]))
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (CELL_PX, CELL_PX)
    red = np.nonzero((sheet == colors[0]).all(-1))
    below = sheet[red[0].max() + 1 : red[0].max() + 24, red[1].min() : red[1].max()]
    assert (below < 128).any()


@pytest.mark.parametrize(("size", "factor"), [((64, 64), 4), ((96, 64), 2), ((1024, 768), 1), ((300, 16), 1)])
def test_small_pictures_are_enlarged_by_a_whole_factor(size, factor):
    sheet = np.asarray(make_sheet([picture((9, 9, 9), size)], ["x"]))
    rows, columns = np.nonzero((sheet == 9).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (size[0] * factor, size[1] * factor)


def test_long_prompts_are_cut_after_three_lines():
    short = make_sheet([picture((0, 0, 0))], ["word " * 12])
    long = make_sheet([picture((0, 0, 0))], ["word " * 500])
    assert long.height <= short.height + 60
