"""Draw the drift report's figures: errors of layers -> drift.svg; images of both bundles -> a contact sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from arcflow_export.drift.layers import LayerDrift
from arcflow_export.formats.thresholds import Thresholds

#: Factor that amplifies the differences on the contact sheet.
AMPLIFIED = 8
#: Sizes in pixels: an image's longer side, gaps, margins, the rows' labels and the captions.
SIDE, GAP, MARGIN, LABEL, CAPTION = 128, 8, 24, 112, 76
_INK, _PAPER = (32, 33, 36), (255, 255, 255)
_COLORS = ("#1b6ca8", "#d7263d", "#5f7a3a", "#8a5a9e")
_SHOWN_CHARACTERS, _LINES = 20, 4


def drift_figure(layers: Sequence[LayerDrift], limits: Thresholds, path: Path) -> None:
    """Plot each layer's error by step, in the graph's order, as SVG."""
    height = 1.4 + 0.19 * len(layers)
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(layers))
    for step in range(max(len(d.errors) for d in layers)):
        rows = [i for i, d in enumerate(layers) if step < len(d.errors)]
        values = [layers[i].errors[step] for i in rows]
        axes.scatter(values, places[rows], s=22, color=_COLORS[step % len(_COLORS)], label=f"step {step}", zorder=3)
    for y, d in zip(places, layers, strict=True):
        axes.plot([min(d.errors), max(d.errors)], [y, y], color="#c8ccd0", linewidth=1.2, zorder=2)
    if limits.layers is not None:
        axes.axvline(limits.layers, color="#9aa0a6", linestyle="--", linewidth=1, label=f"limit {limits.layers:g}")
    axes.set_xscale("log")
    axes.set_yticks(places, [d.layer for d in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("relative RMS error of the layer's output, given the reference's input")
    axes.grid(axis="x", color="#e8eaed", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=5, frameon=False, fontsize=8)
    # Without a date and random ids, the same drift gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "arcflow"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def contact_sheet(prompts: Sequence[str], reference: np.ndarray, candidate: np.ndarray) -> Image.Image:
    """Make a sheet with one column per prompt and three rows: reference, candidate, and their amplified difference.

    Args:
        prompts: [n].
        reference: [n, H, W, 3] uint8.
        candidate: [n, H, W, 3] uint8.
    """
    difference = np.abs(candidate.astype(np.int16) - reference) * AMPLIFIED
    rows = {
        "reference": reference,
        "candidate": candidate,
        f"difference\nx {AMPLIFIED}": difference.clip(max=255).astype(np.uint8),
    }
    h, w = reference.shape[1:3]
    scale = SIDE / max(h, w)
    size = (round(w * scale), round(h * scale))
    width = 2 * MARGIN + LABEL + len(prompts) * (size[0] + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + CAPTION + len(rows) * (size[1] + GAP) - GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        x = MARGIN + LABEL + column * (size[0] + GAP)
        lines = textwrap.wrap(prompt, _SHOWN_CHARACTERS)[:_LINES]
        draw.multiline_text((x, MARGIN), "\n".join(lines), _INK, _font(11), spacing=3)
        for row, images in enumerate(rows.values()):
            method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(
                Image.fromarray(images[column]).resize(size, method), (x, MARGIN + CAPTION + row * (size[1] + GAP))
            )
    for row, label in enumerate(rows):
        y = MARGIN + CAPTION + row * (size[1] + GAP) + size[1] / 2
        draw.multiline_text((MARGIN, y), label, _INK, _font(13), anchor="lm", spacing=4)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
