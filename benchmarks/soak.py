"""Check that memory stays flat while thousands of images are generated, in Python or, with --library, in C++.

Prompts, sizes and batches vary, so that caches and engines get more of them than they keep. --reopen also closes the
pipeline and opens it again. Different --threads show what the engines' own threads add.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from machine import describe
from tqdm import trange

from arcflow_runtime import Pipeline

EMBED = Path(__file__).parent.parent / "runtime" / "cpp" / "examples" / "embed.py"
SIZES_PX = ((32, 32), (48, 32), (64, 64))
#: More prompts than the 16 whose embeddings are cached.
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "pink") for shape in ("star", "circle")]
PROMPTS += [f"{prompt} on the {side}" for prompt in PROMPTS for side in ("left", "right")]


def load_embed() -> ModuleType:
    """Load the Python example that binds the C++ library."""
    spec = importlib.util.spec_from_file_location("embed", EMBED)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


class CppPipeline:
    """The C++ library's pipeline, with the call of Python's pipeline."""

    def __init__(self, library: Path, bundle: Path, threads: int) -> None:
        embed = load_embed()
        self._pipe = embed.Pipeline(embed.load(str(library)), bundle, threads=threads)

    def __call__(self, prompts: list[str], height: int, width: int, seed: int) -> object:
        """Generate images."""
        return self._pipe.generate(prompts, seeds=[seed], height=height, width=width)

    def close(self) -> None:
        """Free the pipeline."""
        self._pipe.close()


def soak(
    library: Path | None, bundle: Path, images: int, every: int, reopen: int, threads: int
) -> list[dict[str, int]]:
    """Generate images, and record the resident memory after every `every` images."""

    def load() -> CppPipeline | Pipeline:
        return CppPipeline(library, bundle, threads) if library else Pipeline.load(bundle, threads=threads or None)

    pipe = load()
    rows = []
    for i in trange(1, images + 1, desc="images", disable=None):
        height, width = SIZES_PX[i % len(SIZES_PX)]
        pipe([PROMPTS[i % len(PROMPTS)]] * (1 + i % 2), height=height, width=width, seed=i)
        if reopen and i % reopen == 0:
            pipe.close()
            pipe = load()
        if i % every == 0:
            rows.append({"images": i, "resident_bytes": resident_bytes()})
    pipe.close()
    return rows


def main() -> int:
    """Run, print the rows, write JSON; fails if memory grew by more than 1 % in the second half of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="for --library, after `arcflow build --backend openvino`")
    parser.add_argument("--library", type=Path, help="libarcflow; without it, the Python runtime runs")
    parser.add_argument("--images", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=200, help="images between rows (default: %(default)s)")
    parser.add_argument("--reopen", type=int, default=0, help="reopen the bundle after every N images (default: never)")
    parser.add_argument("--threads", type=int, default=0, help="per engine; 0 is one per core (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    started = time.perf_counter()
    rows = soak(args.library, args.bundle, args.images, args.every, args.reopen, args.threads)
    for row in rows:
        print(f"{row['images']:>7} images {row['resident_bytes'] / 2**20:8.1f} MiB")
    half = rows[len(rows) // 2 :]
    growth = half[-1]["resident_bytes"] / half[0]["resident_bytes"] - 1
    machine = describe()
    print(f"second half: {growth:+.2%}; {machine['cpu']}, {machine['cores']} cores")
    if args.json:
        result: dict[str, Any] = {"rows": rows, "growth_of_second_half": growth, "reopen": args.reopen}
        result["threads"] = args.threads
        result["seconds"] = time.perf_counter() - started
        data = {"command": " ".join(sys.argv), "machine": machine, "results": result}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return int(growth > 0.01)


if __name__ == "__main__":
    sys.exit(main())
