"""Make the README's image, docs/showcase.png, with a bundle of the shapes student and its teacher.

It shows six prompts with the seeds 0 to 5, not selected by their results. In each column, all images start from the
same noise: the teacher with 50 network calls, the student with 2, and the teacher with 2. diffusers runs the teacher.

    python benchmarks/showcase.py out/shapes-fp32 --out docs/showcase.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

from arcflow_runtime import Pipeline

PROMPTS = (
    "a large red circle",
    "a small yellow heart",
    "a green triangle",
    "a purple cross",
    "a blue diamond",
    "a large orange square",
)
SEEDS = tuple(range(len(PROMPTS)))
TEACHER = Path(__file__).parent.parent / "models" / "shapes" / "teacher"
#: The image size and text length that the shapes model was trained for.
SIZE_PX, MAX_SEQUENCE_LENGTH = 64, 12
#: Layout in pixels: an image on the sheet, gaps, the column of labels, the line of prompts.
CELL, GAP, LABELS, PROMPT_LINE = 160, 10, 190, 52
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (112, 117, 122)


def main() -> None:
    """Generate the images and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the shapes student, as `make demo` exports it")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    teacher = FluxPipeline.from_pretrained(TEACHER, dtype=torch.float32, use_safetensors=True)
    with Pipeline.load(args.bundle) as student:
        rows = {
            ("Teacher", "50 network calls"): _teacher(teacher, 50),
            ("ArcFlow student", "2 network calls"): list(student(PROMPTS, seed=SEEDS).images),
            ("Teacher", "2 network calls"): _teacher(teacher, 2),
        }
    _sheet(rows).save(args.out, optimize=True)


def _teacher(pipe: FluxPipeline, calls: int) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(
        list(PROMPTS),
        height=SIZE_PX,
        width=SIZE_PX,
        num_inference_steps=calls,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=generators,
    ).images


def _sheet(rows: dict[tuple[str, str], list[Image.Image]]) -> Image.Image:
    """Make the sheet, with a row for each sampler and a column for each prompt."""
    step = CELL + GAP
    sheet = Image.new("RGB", (LABELS + len(PROMPTS) * step, PROMPT_LINE + len(rows) * step), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(PROMPTS):
        center = (LABELS + i * step + CELL / 2, PROMPT_LINE / 2)
        text = "\n".join(textwrap.wrap(prompt, 16))
        draw.multiline_text(center, text, _FAINT, ImageFont.load_default(16), anchor="mm", align="center")
    for row, ((who, calls), images) in enumerate(rows.items()):
        top = PROMPT_LINE + row * step
        draw.text((GAP, top + CELL / 2 - 14), who, _INK, ImageFont.load_default(21), anchor="lm")
        draw.text((GAP, top + CELL / 2 + 14), calls, _INK, ImageFont.load_default(18), anchor="lm")
        for i, image in enumerate(images):
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.BICUBIC), (LABELS + i * step, top))
    return sheet


if __name__ == "__main__":
    main()
