"""Draw a comparison: images of every subject with their times -> a contact sheet; quality against time -> SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from arcflow_export.compare.generate import Generated
from arcflow_export.compare.report import Row

#: Prompts on the contact sheet.
SHOWN = 8
#: Sizes in pixels: an image's longer side, gaps, the rows' labels, the prompts, and the line of a time.
SIDE, GAP, LABEL, CAPTION, TIME = 144, 8, 190, 64, 18
_INK, _FAINT, _PAPER = (32, 33, 36), (112, 117, 122), (255, 255, 255)


def contact_sheet(results: Sequence[Generated], prompts: Sequence[str]) -> Image.Image:
    """Make a sheet with a row for each subject and a column for each of the first prompts; times are under the images.

    Args:
        results: of all subjects, for the same n cases.
        prompts: [n].
    """
    shown = min(SHOWN, len(prompts))
    height, width = results[0].images.shape[1:3]
    scale = SIDE / max(height, width)
    cell = (round(width * scale), round(height * scale))
    step = (cell[0] + GAP, cell[1] + TIME + GAP)
    sheet = Image.new("RGB", (LABEL + shown * step[0] + GAP, CAPTION + len(results) * step[1] + GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts[:shown]):
        lines = textwrap.wrap(prompt, 22, max_lines=4, placeholder=" …")
        draw.multiline_text((LABEL + column * step[0], GAP), "\n".join(lines), _INK, ImageFont.load_default(11))
    for row, result in enumerate(results):
        top = CAPTION + row * step[1]
        calls = f"{result.calls} network call{'s' if result.calls > 1 else ''}"
        draw.text((GAP, top + cell[1] / 2 - 10), result.subject.name, _INK, ImageFont.load_default(14), anchor="lm")
        draw.text((GAP, top + cell[1] / 2 + 10), calls, _FAINT, ImageFont.load_default(13), anchor="lm")
        for column in range(shown):
            left = LABEL + column * step[0]
            method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(result.images[column]).resize(cell, method), (left, top))
            time = f"{result.seconds[column]:.3f} s"
            draw.text((left, top + cell[1] + TIME / 2), time, _FAINT, ImageFont.load_default(11), anchor="lm")
    return sheet


def quality_figure(rows: Sequence[Row], path: Path) -> None:
    """Plot quality against time as SVG: the judge's share of right and clean images, or PSNR against the first subject.

    Without a judge the first subject is left out, because its PSNR against itself means nothing.
    """
    judged = rows[0].right is not None
    shown = rows if judged else rows[1:]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in shown:
        quality = 100 * row.right if row.right is not None else row.psnr_db
        axes.scatter([row.seconds], [quality], s=36, color="#1b6ca8", zorder=3)
        axes.annotate(row.name, (row.seconds, quality), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.set_xlabel("seconds an image")
    axes.set_ylabel("right and clean images, %" if judged else f"PSNR against {rows[0].name}, dB")
    axes.grid(color="#e8eaed", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    # Without a date and random ids, the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "arcflow"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
