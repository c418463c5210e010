"""What LoRA slots cost on a CPU: milliseconds per image, with no LoRA and with LoRAs of several ranks, and per switch.

The medium FLUX student of `cpu_vs_torch.py` is exported plainly, with slots for attention and with slots for all
linears. PyTorch runs the same student with the LoRA unmerged in peft, and switches it with diffusers' hotswap. All
variants take turns, so that a change in the machine's load affects each. Text embeddings are cached, and nothing is
decoded: an image is one run of the conditioner and two of the backbone.

    python benchmarks/lora.py --json benchmarks/results/lora.json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_vs_torch import make_medium
from machine import describe
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from arcflow_export.checkpoint.sources import Location
from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.export.export import export_bundle, plan_export
from arcflow_export.options import SLOT_PATTERNS, ExportOptions
from arcflow_export.student.load import Student, load_student
from arcflow_export.student.reference import TorchStudent, pack
from arcflow_runtime import Bundle, Pipeline
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE

PROMPT, PX, TEXT_TOKENS, STEPS = "a large red circle on a blue background", 512, 128, 2
RANKS = (16, 64, 128)
PEER_RANK = 16
SWITCHES = 50


def write_lora(path: Path, layers: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> Path:
    """Write a LoRA of random factors for linears of the transformer, in diffusers' naming: name -> (in, out)."""
    random, tensors = np.random.default_rng(seed), {}
    for name, (inputs, outputs) in layers.items():
        a = random.standard_normal((rank, inputs)) / inputs**0.5
        tensors[f"transformer.{name}.lora_A.weight"] = a.astype(np.float32)
        b = random.standard_normal((outputs, rank)) * 0.02 / rank**0.5
        tensors[f"transformer.{name}.lora_B.weight"] = b.astype(np.float32)
    save_file(tensors, path)
    return path


def slot_sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of the transformer's linears with slots."""
    slots = Bundle.open(root).manifest.slots()
    parts = [slots[part].layers for part in ("backbone", "conditioner") if part in slots]
    return {name: (layer.in_features, layer.out_features) for layers in parts for name, layer in layers.items()}


def open_variants(root: Path, student: Callable[..., Student]) -> dict[str, Callable[[], object]]:
    """Variant -> a function that makes one image."""
    found: dict[str, Callable[[], object]] = {}

    def ours(pipe: Pipeline, loras: dict[str, float]) -> Callable[[], object]:
        return lambda: pipe(PROMPT, PX, PX, seed=1, max_sequence_length=TEXT_TOKENS, output_type="latents", loras=loras)

    found["plain bundle"] = ours(Pipeline.load(export(student(), root / "plain")), {})
    for chosen, pattern in SLOT_PATTERNS.items():
        bundle = export(student(), root / chosen, lora_slots=(pattern,), lora_max_rank=max(RANKS))
        pipe = Pipeline.load(bundle)
        found[f"{chosen}, no LoRA"] = ours(pipe, {})
        for rank in RANKS:
            file = write_lora(root / f"{chosen}-{rank}.safetensors", slot_sizes(bundle), rank)
            found[f"{chosen}, rank {rank}"] = ours(pipe, {pipe.load_lora(file): 0.8})
    for which in (None, *SLOT_PATTERNS):
        loras = [] if which is None else [(Location(str(root / f"{which}-{PEER_RANK}.safetensors")), 0.8)]
        found[f"PyTorch, {which or 'no LoRA'}" + (f", rank {PEER_RANK}" if which else "")] = theirs(student(loras))
    return found


def theirs(student: Student) -> Callable[[], object]:
    """The same work in PyTorch; its text states are computed once."""
    reference = TorchStudent(student)
    states, pooled = reference.encode(PROMPT, TEXT_TOKENS)
    sigmas = reference.schedule(STEPS, PX, PX)
    channels = reference.transformer.config.in_channels // 4
    noise = pack(torch.randn(1, channels, PX // 8, PX // 8, generator=torch.Generator().manual_seed(1)))

    def generate() -> torch.Tensor:
        x = noise
        for i in range(STEPS):
            heads = reference.predict(x, sigmas[i], states, pooled, PX, PX, DEFAULT_GUIDANCE_SCALE)
            x = reference.step(x, heads, float(sigmas[i]), float(sigmas[i + 1]))
        return x

    return generate


def switch_times(root: Path) -> dict[str, float]:
    """Milliseconds of one switch, by kind; medians."""
    bundle = root / "all"
    with Pipeline.load(bundle) as pipe:
        files = [write_lora(root / f"switch{i}.safetensors", slot_sizes(bundle), PEER_RANK, i) for i in range(2)]
        for i, file in enumerate(files):
            pipe.load_lora(file, str(i))

        def ours(i: int) -> float:
            sizes = {"height": 64, "width": 64, "max_sequence_length": 16, "output_type": "latents", "seed": 1}
            return pipe(PROMPT, **sizes, loras={str(i % 2): 0.8}).timings_ms["loras"]  # type: ignore[arg-type]

        new_scale = [ours(0), ours(1)]
        prepared = [ours(i) for i in range(SWITCHES)]
        new_file = []
        for i in range(SWITCHES // 5):
            started = time.perf_counter()
            pipe.load_lora(files[i % 2], "new")
            pipe._loras.get((("new", 0.8),))
            new_file.append((time.perf_counter() - started) * 1e3)
            pipe.unload_lora("new")
    return {
        "prepared_ms": statistics.median(prepared),
        "prepare_ms": statistics.median(new_scale),
        "new_file_ms": statistics.median(new_file),
        "file_bytes": files[0].stat().st_size,
    }


def hotswap_ms(root: Path, student: Callable[..., Student]) -> float:
    """Milliseconds of diffusers' hotswap between two files that are in memory already; median."""
    # `TorchStudent` wraps the embedding of the timestep, so hotswap does not find its linears under their names.
    sizes = {name: size for name, size in slot_sizes(root / "all").items() if not name.startswith("time_text_embed.")}
    files = [write_lora(root / f"hotswap{i}.safetensors", sizes, PEER_RANK, i) for i in range(2)]
    reference = TorchStudent(student([(Location(str(files[0])), 0.8)]))
    states = [
        {k.removeprefix("transformer."): torch.from_numpy(v) for k, v in load_file(file).items()} for file in files
    ]
    times = []
    for i in range(SWITCHES // 5):
        started = time.perf_counter()
        reference.transformer.load_lora_adapter(dict(states[i % 2]), prefix=None, adapter_name="style0", hotswap=True)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def export(student: Student, out: Path, **options: Any) -> Path:
    """Export in float32."""
    return export_bundle(plan_export(student, ExportOptions(**options)), out, "benchmark")


def measure(variants: dict[str, Callable[[], object]], runs: int) -> list[dict[str, Any]]:
    """Time every variant by turns: wall and CPU milliseconds, and the CPU time relative to the first variant's turn."""
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for generate in variants.values():
        generate()
    for _ in tqdm(range(runs), desc="runs", disable=None):
        for name, generate in variants.items():
            started, used = time.perf_counter(), time.process_time()
            generate()
            cpu[name].append((time.process_time() - used) * 1e3)
            wall[name].append((time.perf_counter() - started) * 1e3)
    first = next(iter(variants))
    rows = []
    for name in variants:
        base = "PyTorch, no LoRA" if name.startswith("PyTorch") else first
        ratios = [mine / plain for mine, plain in zip(cpu[name], cpu[base], strict=True)]
        rows.append(
            {
                "variant": name,
                "wall_ms": statistics.median(wall[name]),
                "cpu_ms": statistics.median(cpu[name]),
                "relative_to": base,
                "cpu_ratio": statistics.median(ratios),
                "cpu_ratios": ratios,
            }
        )
    return rows


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    quiet_libraries()
    logging.getLogger("arcflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_medium(root / "medium")
        base, adapter = (Location(str(root / "medium" / name)) for name in ("base", "adapter"))

        def student(loras: list[tuple[Location, float]] | None = None) -> Student:
            return load_student(base, adapter, loras or [])

        load = os.getloadavg()
        rows = measure(open_variants(root, student), args.runs)
        for row in rows:  # before anything else can fail
            print(
                f"{row['variant']:24}{row['wall_ms']:>10.0f} ms{row['cpu_ms']:>8.0f} ms of CPU{row['cpu_ratio']:>8.3f}x"
            )
        switches = switch_times(root) | {"hotswap_ms": hotswap_ms(root, student)}
        counts = {name: len(slot_sizes(root / name)) for name in SLOT_PATTERNS}
    print(switches)
    if args.json:
        data = {
            "command": " ".join(sys.argv),
            "machine": describe() | {"load_average": load},
            "px": PX,
            "text_tokens": TEXT_TOKENS,
            "runs": args.runs,
            "linears": counts,
            "results": rows,
            "switches": switches,
        }
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
