"""Write a random checkpoint with FLUX.1-dev's or Qwen-Image's real sizes, and an ArcFlow adapter that fits it.

DIR/base is a diffusers pipeline with the hub's file names, shards, keys, shapes and dtype (bfloat16). DIR/adapter is an
adapter in the released format. With `--fill random`, every value comes from a seeded generator, with limited exponents
so that it is finite and small. With `--fill sparse`, the files have the right size but are holes, so every value is 0.
The tokenizers are those of the tiny golden checkpoints, so the checkpoint can be exported, but its prompts mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from fullsize_models import Component, Shapes

BF16_BYTES = 2
CHUNK_BYTES = 32 << 20
#: Four bfloat16 at a time: keep sign, mantissa and the three low bits of the exponent, and set its high bits to
#: 01110, which gives 2**-15 <= |x| < 2**-7.
_KEEP, _SET = np.uint64(0x83FF83FF83FF83FF), np.uint64(0x3800380038003800)
_GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


class FullsizeError(Exception):
    """The checkpoint cannot be written; the message says why and what to do."""


@dataclass(frozen=True)
class File:
    """One safetensors file to write: its path below DIR, its header, and the bytes of its tensors."""

    path: str
    header: bytes
    data_bytes: int

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


def layout(component: Component) -> tuple[list[File], dict[str, Any] | None]:
    """Split a component into files as diffusers and transformers do: in order, with a new file when one is full.

    Returns:
        The files, and the content of the index beside them (None for a single file).
    """
    shards: list[Shapes] = [{}]
    size = 0
    for key, shape in component.shapes.items():
        num_bytes = prod(shape) * BF16_BYTES
        if shards[-1] and size + num_bytes > component.max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = shape
        size += num_bytes
    folder = component.folder if component.folder == "adapter" else f"base/{component.folder}"
    files: list[File] = []
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        part = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{component.stem}{part}.safetensors"
        header, data_bytes = _header(shard, component.metadata)
        files.append(File(f"{folder}/{name}", header, data_bytes))
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) == 1:
        return files, None
    total = sum(f.data_bytes for f in files)
    return files, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _header(shapes: Shapes, metadata: dict[str, str]) -> tuple[bytes, int]:
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, shape in sorted(shapes.items()):
        end = offset + prod(shape) * BF16_BYTES
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def random_chunks(seed: int, path: str, num_bytes: int) -> Iterator[np.ndarray]:
    """Yield `num_bytes` of random finite bfloat16 values as uint8 chunks; they depend only on seed and path.

    A second thread makes the next chunk while the caller writes this one.
    """
    stream = np.random.Generator(np.random.SFC64([seed, zlib.crc32(path.encode())]))

    def make(size: int) -> np.ndarray:
        words = stream.integers(0, 2**64 - 1, size=-(-size // 8), dtype=np.uint64, endpoint=True)
        words &= _KEEP
        words |= _SET
        return words.view(np.uint8)[:size]

    sizes = [CHUNK_BYTES] * (num_bytes // CHUNK_BYTES) + [num_bytes % CHUNK_BYTES]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, sizes[0])
        for size in [*sizes[1:], 0]:
            chunk, ahead = ahead.result(), pool.submit(make, size)
            yield chunk


def write_checkpoint(model: str, fill: str, out: Path, seed: int) -> None:
    """Write the checkpoint; `out` is removed again if that fails.

    Args:
        model: "flux" or "qwen".
        fill: "random" or "sparse".
        out: a directory that does not exist yet.
        seed: seed of the random values.

    Raises:
        FullsizeError: `out` exists, its parent does not, or the disk is too small.
    """
    from fullsize_models import components, model_index, scheduler

    if out.exists():
        raise FullsizeError(f"--out: {out} exists; remove it or give another name")
    if not out.parent.is_dir():
        raise FullsizeError(f"--out: {out.parent} is not a directory; create it first")
    plans = [(c, *layout(c)) for c in components(model)]
    total = sum(f.bytes for _, files, _ in plans for f in files)
    needed, free = (total if fill == "random" else 1 << 26), shutil.disk_usage(out.parent).free
    if free < needed:
        raise FullsizeError(
            f"--out: {out.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f} GB; "
            "free some space, or use --fill sparse"
        )
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"{model} {fill}", disable=None) as bar:
            for component, files, index in plans:
                folder = (out / files[0].path).parent
                folder.mkdir(parents=True)
                _write_json(folder / "config.json", component.config)
                if index is not None:
                    _write_json(folder / f"{component.stem}.safetensors.index.json", index)
                for file in files:
                    _write_file(out / file.path, file, fill, seed, bar)
        tiny = _GOLDEN / f"{model}-tiny" / "base"
        for source in sorted(tiny.glob("tokenizer*")):
            shutil.copytree(source, out / "base" / source.name)
        (out / "base" / "scheduler").mkdir()
        _write_json(out / "base" / "scheduler" / "scheduler_config.json", scheduler(model))
        _write_json(out / "base" / "model_index.json", model_index(model))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    for component, files, _ in plans:
        count = sum(map(prod, component.shapes.values()))
        size = sum(f.bytes for f in files)
        print(f"  {component.folder:16}{count:>16,} parameters {size:>16,} bytes in {len(files)} file(s)")
    print(f"wrote {out}: {total:,} bytes, {fill}")


def _write_file(path: Path, file: File, fill: str, seed: int, bar: tqdm[Any]) -> None:
    with path.open("wb") as f:
        f.write(file.header)
        if fill == "sparse":
            f.truncate(file.bytes)
            bar.update(file.bytes)
            return
        bar.update(len(file.header))
        for chunk in random_chunks(seed, file.path, file.data_bytes):
            f.write(chunk.data)
            bar.update(len(chunk))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Parse the command line and write the checkpoint; returns 0 if done, 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flux", "qwen"), required=True)
    parser.add_argument("--fill", choices=("random", "sparse"), default="random", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random values; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to create")
    args = parser.parse_args()
    try:
        write_checkpoint(args.model, args.fill, args.out, args.seed)
    except (FullsizeError, OSError) as e:
        print(f"fullsize: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
