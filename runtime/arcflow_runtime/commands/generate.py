"""Generate images from prompts with a bundle.

Several prompts, or --num-images above 1, write NAME-0.png, NAME-1.png and so on. With --sheet, one PNG shows all images
with their prompts. Each PNG records its prompt, seed, number of steps and LoRAs. The same prompt, size, steps and seed
generate the same image again, alone or in any batch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_runtime.backends import DEFAULT_BACKEND, choices
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.disk.outputs import check_writable
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from arcflow_runtime.generate.pipeline import Pipeline, PipelineOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("prompt", nargs="+", help="text prompt; several prompts make one batch")
    parser.add_argument("--out", type=Path, default=Path("image.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: 1024 or the nearest allowed)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: as for --height)")
    parser.add_argument("--steps", type=int, help="number of denoising steps (default: the bundle's)")
    parser.add_argument(
        "--seed",
        type=_seeds,
        metavar="N[,N...]",
        help="seed of the first image, and the next integers for the others; or one seed per image (default: random, "
        "and printed)",
    )
    parser.add_argument("--guidance-scale", type=float, help=f"FLUX guidance (default: {DEFAULT_GUIDANCE_SCALE})")
    parser.add_argument("--num-images", type=int, default=1, help="images per prompt (default: %(default)s)")
    parser.add_argument("--sheet", action="store_true", help="write one PNG of all images with their prompts")
    parser.add_argument("--max-sequence-length", type=int, help="largest number of text tokens (default: the bundle's)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="LoRA for a bundle with slots, such as ink.safetensors:0.8; repeatable (default scale: 1)",
    )
    parser.add_argument(
        "--memory",
        choices=MODES,
        help="parts that stay loaded: all, those that every image needs, or none (default: by the free memory)",
    )
    parser.add_argument("--backend", choices=choices(), default=DEFAULT_BACKEND, help="engine (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate the images and write them as PNG files."""
    _check_out(args.out)
    loras = _loras(args.lora)
    from arcflow_runtime.generate.pipeline import Pipeline

    with Pipeline.load(args.bundle, args.backend, args.memory, threads=args.threads) as pipeline:
        for file in loras:
            pipeline.load_lora(file, name=file)
        output = _generate(pipeline, args, loras)
    steps = args.steps or pipeline.bundle.manifest.schedule.num_inference_steps
    prompts = [args.prompt[i // args.num_images] for i in range(len(output.images))]
    images = list(output.images)
    if args.sheet:
        from arcflow_runtime.generate.sheet import make_sheet

        images, prompts = [make_sheet(images, prompts)], ["\n".join(prompts)]
    paths = _paths(args.out, len(images))
    seeds = [str(seed) for seed in (output.seed if isinstance(output.seed, tuple) else (output.seed,))]
    used = {"loras": ",".join(f"{Path(file).name}:{scale:g}" for file, scale in loras.items())} if loras else {}
    recorded = [",".join(seeds)] if args.sheet else seeds
    for path, image, prompt, seed in zip(paths, images, prompts, recorded, strict=True):
        _write_png(path, image, {"prompt": prompt, "seed": seed, "steps": str(steps), **used})
    if args.json:
        print(
            json.dumps(
                {
                    "images": [str(p) for p in paths],
                    "seed": output.seed,
                    "warnings": list(output.warnings),
                    "timings_ms": {k: round(v, 3) for k, v in output.timings_ms.items()},
                },
                indent=2,
            )
        )
    else:
        for path in paths:
            print(path)
        print(f"seed {','.join(seeds)}, {output.timings_ms['total'] / 1e3:.2f} s")
    return 0


def _check_out(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise RequestError(f"--out must end in .png, got {str(out)!r}")
    if not out.parent.is_dir():
        raise RequestError(f"--out must be in a directory that exists, got {str(out)!r}; create {out.parent} first")
    if out.is_dir():
        raise RequestError(f"--out must be a file, got the directory {str(out)!r}")
    check_writable(out, "--out")


def _generate(pipeline: Pipeline, args: argparse.Namespace, loras: dict[str, float]) -> PipelineOutput:
    # Without a step callback, which would keep a GPU from running all steps as one CUDA graph.
    return pipeline(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=_one_each(args.seed, len(args.prompt) * args.num_images),
        num_images_per_prompt=args.num_images,
        max_sequence_length=args.max_sequence_length,
        loras=loras,
    )


def _loras(texts: list[str]) -> dict[str, float]:
    """Path -> scale of each --lora."""
    from arcflow_runtime.lora.argument import parse_lora

    loras: dict[str, float] = {}
    for text in texts:
        try:
            path, scale = parse_lora(text)
        except ValueError as e:
            raise RequestError(str(e)) from None
        if path in loras:
            raise RequestError(f"--lora: {path} is given twice; give one scale for it")
        loras[path] = scale
    return loras


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, or several such as 1,2,3, got {text!r}") from None


def _one_each(seeds: list[int] | None, images: int) -> list[int] | None:
    """One seed per image, so that each image can be generated again alone; a single seed counts up."""
    if seeds is None or len(seeds) > 1:
        return seeds
    return [seeds[0] + i for i in range(max(images, 1))]


def _paths(out: Path, count: int) -> list[Path]:
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(count)]


def _write_png(path: Path, image: Image.Image, text: dict[str, str]) -> None:
    """Write a PNG with `text` as metadata, beside `path` and then renamed, so that it is never incomplete."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as f:
            image.save(f, "PNG", pnginfo=info)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
