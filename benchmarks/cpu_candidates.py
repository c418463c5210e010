"""What `cpu_vs_torch.py` compares, and the process that measures one of them: a candidate's name -> JSON on stdout.

Each candidate has a process of its own, so that no library's threads and memory disturb another's.

    python benchmarks/cpu_candidates.py "PyTorch bfloat16" FOLDER --size-px 512 --text-tokens 128 --runs 5 --image F.npy
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "a large red circle on a blue background"
#: Runs before the timed ones. The first compiles and allocates, the second reaches the speed of the others.
WARM_UP = 2


@dataclass(frozen=True)
class Made:
    """How a precision's bundle is made: `dtype` and other options of `arcflow export`, then of `arcflow quantize`."""

    dtype: str
    quantize: tuple[str, ...] = ()
    export: tuple[str, ...] = ()


#: Precision -> its bundle. A new precision needs a line here and one for each engine in `CANDIDATES`.
BUNDLES = {
    "float32": Made("float32"),
    "bfloat16": Made("bfloat16"),
    "int8": Made("float32", ("--format", "int8")),
    "int8 and bfloat16": Made("bfloat16", ("--format", "int8"), ("--keep-float32", "*")),
}


@dataclass(frozen=True)
class Ours:
    """This runtime with one of its engines."""

    backend: str
    precision: str

    @property
    def name(self) -> str:
        """The candidate's name in tables."""
        return f"arcflow, {({'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'})[self.backend]} {self.precision}"


@dataclass(frozen=True)
class Peer:
    """diffusers' pipeline in PyTorch; `merged` has the adapter's LoRA in the weights, else peft computes it."""

    dtype: str
    merged: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        """The candidate's name in tables."""
        return f"PyTorch {self.dtype}{', compiled' * self.compiled}{', merged' * self.merged}"


_OURS = (
    Ours("onnxruntime", "float32"),
    Ours("openvino", "float32"),
    Ours("openvino", "bfloat16"),
    Ours("onnxruntime", "int8"),
    Ours("openvino", "int8"),
    Ours("openvino", "int8 and bfloat16"),
)
_PEERS = (Peer(d, m, c) for d in ("float32", "bfloat16") for c in (False, True) for m in (False, True))
CANDIDATES: dict[str, Ours | Peer] = {c.name: c for c in _OURS} | {c.name: c for c in _PEERS}
#: The candidate whose images the others are compared with: the reference implementation.
REFERENCE = Peer("float32").name


def bundle_of(folder: Path, precision: str) -> Path:
    """Where a precision's bundle is, below a workload's folder."""
    return folder / f"{precision.replace(' ', '-')}.bundle"


def _ours(candidate: Ours, folder: Path, size_px: int, text_tokens: int) -> Callable[[], tuple[np.ndarray, Any]]:
    from arcflow_runtime import Pipeline

    pipe = Pipeline.load(bundle_of(folder, candidate.precision), backend=candidate.backend)

    def generate() -> tuple[np.ndarray, Any]:
        pipe.clear_cache()
        out = pipe(PROMPT, size_px, size_px, seed=1, max_sequence_length=text_tokens, output_type="numpy")
        return np.asarray(out.images), dict(out.timings_ms)

    return generate


def _peer(candidate: Peer, folder: Path, size_px: int, text_tokens: int) -> Callable[[], tuple[np.ndarray, Any]]:
    import torch

    from arcflow_export.checkpoint.sources import Location
    from arcflow_export.commands.sources import quiet_libraries
    from arcflow_export.student.load import load_student
    from arcflow_export.student.reference import TorchStudent

    quiet_libraries()
    student = load_student(Location(str(folder / "base")), Location(str(folder / "adapter")), [])
    reference: Any = TorchStudent(student, getattr(torch, candidate.dtype))
    if candidate.merged:
        reference.transformer.fuse_lora()
        reference.transformer.unload_lora()
    if candidate.compiled:
        # What takes the time: the network, its heads and the decoder. The shapes are static.
        reference.transformer = torch.compile(reference.transformer, dynamic=False)
        reference.heads = torch.compile(reference.heads, dynamic=False)
        reference.pipe.vae.decoder = torch.compile(reference.pipe.vae.decoder, dynamic=False)

    def generate() -> tuple[np.ndarray, Any]:
        run = reference.generate(PROMPT, size_px, size_px, seed=1, max_sequence_length=text_tokens)
        return run.images.float().numpy(), None

    return generate


def main() -> int:
    """Measure one candidate: milliseconds of wall and processor time of each run, and the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidate", choices=list(CANDIDATES))
    parser.add_argument("folder", type=Path, help="with base/, adapter/ and the bundles")
    parser.add_argument("--size-px", type=int, required=True)
    parser.add_argument("--text-tokens", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--image", type=Path, required=True, help="the last image is written here")
    args = parser.parse_args()
    logging.getLogger("arcflow").setLevel(logging.ERROR)
    candidate = CANDIDATES[args.candidate]
    if isinstance(candidate, Ours):
        generate = _ours(candidate, args.folder, args.size_px, args.text_tokens)
    else:
        generate = _peer(candidate, args.folder, args.size_px, args.text_tokens)
    for _ in range(WARM_UP):
        generate()
    wall_ms, cpu_ms = [], []
    for _ in range(args.runs):
        before, started = os.times(), time.perf_counter()
        image, stages = generate()
        wall_ms.append((time.perf_counter() - started) * 1e3)
        after = os.times()
        cpu_ms.append((after.user - before.user + after.system - before.system) * 1e3)
    np.save(args.image, image)
    print(json.dumps({"wall_ms": wall_ms, "cpu_ms": cpu_ms, "stages_ms": stages}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
