"""Compare this runtime with PyTorch on the same student, in one run: milliseconds per image on a CPU.

PyTorch runs as the reference does: diffusers' transformer, unmerged LoRA with peft, and the update in torch. Runs
alternate between the two, so that a change in the machine's load affects both. Text embeddings are not cached.

    python benchmarks/cpu_vs_torch.py --json benchmarks/results/cpu_vs_torch.json
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from machine import describe
from safetensors.torch import save_file
from tqdm import tqdm

from arcflow_export.checkpoint.sources import Location
from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.export.export import export_bundle, plan_export
from arcflow_export.options import ExportOptions
from arcflow_export.student.load import Student, load_student
from arcflow_export.student.reference import TorchStudent
from arcflow_runtime import Pipeline

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
PROMPT = "a large red circle on a blue background"


@dataclass(frozen=True)
class Workload:
    """One student and one request."""

    name: str
    size_px: int
    max_sequence_length: int
    runs: int


#: About 100 million parameters in the transformer: width 768, 2 double and 6 single blocks.
MEDIUM = {
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "num_attention_heads": 12,
    "num_layers": 2,
    "num_single_layers": 6,
}
WORKLOADS = (Workload("tiny", 64, 64, 100), Workload("medium", 512, 128, 10))


def make_medium(folder: Path) -> None:
    """Write a base of about 100 million parameters and an adapter of rank 64, with random weights, to `folder`."""
    torch.manual_seed(0)
    shutil.copytree(GOLDEN / "flux-tiny" / "base", folder / "base")
    config = json.loads((folder / "base" / "transformer" / "config.json").read_text()) | MEDIUM
    transformer = FluxTransformer2DModel.from_config(config)
    shutil.rmtree(folder / "base" / "transformer")
    transformer.save_pretrained(folder / "base" / "transformer")
    dim, rank, k, p = 768, 64, 16, 4
    targets = (
        "proj_mlp",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "linear_1",
        "linear_2",
    )
    state = {}
    for name, module in transformer.named_modules():
        single_out = name.startswith("single_") and name.endswith("proj_out")
        if isinstance(module, torch.nn.Linear) and (name.endswith(targets) or single_out):
            state[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features) / module.in_features**0.5
            state[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.02
    for head, rows in (("means", k * 64), ("logweights", k * p), ("loggamma", (k - 1) * p)):
        state[f"proj_out_{head}.weight"] = torch.randn(rows, dim) / dim**0.5
        state[f"proj_out_{head}.bias"] = torch.zeros(rows)
    state["norm_out.linear.weight"] = transformer.norm_out.linear.weight.detach().clone()
    state["norm_out.linear.bias"] = transformer.norm_out.linear.bias.detach().clone()
    (folder / "adapter").mkdir()
    save_file(state, folder / "adapter" / "diffusion_pytorch_model.safetensors")
    arc = config | {"_class_name": "ArcFluxTransformer2DModel", "num_gaussians": k, "logweights_channels": p}
    (folder / "adapter" / "config.json").write_text(json.dumps(arc))


def measure(workload: Workload, student: Student, bundle: Path) -> dict[str, Any]:
    """Time both, alternating, and compare their images."""
    px, length = workload.size_px, workload.max_sequence_length
    reference = TorchStudent(student)
    pipe = Pipeline.load(bundle)

    def ours() -> np.ndarray:
        pipe.clear_cache()
        return np.asarray(pipe(PROMPT, px, px, seed=1, max_sequence_length=length, output_type="numpy").images)

    def theirs() -> np.ndarray:
        return reference.generate(PROMPT, px, px, seed=1, max_sequence_length=length).images.numpy()

    difference = float(np.abs(ours() - theirs()).max())
    times: dict[str, list[float]] = {"arcflow": [], "torch": []}
    for _ in tqdm(range(workload.runs), desc=workload.name, disable=None):
        for name, generate in (("arcflow", ours), ("torch", theirs)):
            started = time.perf_counter()
            generate()
            times[name].append((time.perf_counter() - started) * 1e3)
    rows = {name: _spread(ms) for name, ms in times.items()}
    pipe.clear_cache()
    stages = pipe(PROMPT, px, px, seed=1, max_sequence_length=length).timings_ms
    return {
        "workload": workload.name,
        "transformer_parameters": student.base_parameters,
        "size_px": px,
        "text_tokens": length,
        "steps": 2,
        "runs": workload.runs,
        "image_difference_levels": difference * 255,
        **rows,
        "speedup": rows["torch"]["median_ms"] / rows["arcflow"]["median_ms"],
        "stages_ms": {name: round(ms, 3) for name, ms in stages.items()},
    }


def _spread(ms: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(ms, n=10)
    return {"median_ms": statistics.median(ms), "p10_ms": deciles[0], "p90_ms": deciles[-1]}


def main() -> int:
    """Run every workload, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", choices=[w.name for w in WORKLOADS], help="run one workload")
    args = parser.parse_args()
    quiet_libraries()
    logging.getLogger("arcflow").setLevel(logging.ERROR)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for workload in WORKLOADS:
            if args.only not in (None, workload.name):
                continue
            source = GOLDEN / "flux-tiny"
            if workload.name == "medium":
                source = root / "medium"
                make_medium(source)
            student = load_student(Location(str(source / "base")), Location(str(source / "adapter")), [])
            bundle = export_bundle(plan_export(student, ExportOptions()), root / f"{workload.name}.bundle", "benchmark")
            results.append(measure(workload, student, bundle))
    machine = describe()
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['versions']}")
    print(f"{'':8}{'parameters':>14}{'px':>6}{'arcflow ms (p10-p90)':>28}{'torch ms (p10-p90)':>28}{'speed-up':>10}")
    for r in results:
        cells = [f"{r[n]['median_ms']:.1f} ({r[n]['p10_ms']:.1f}-{r[n]['p90_ms']:.1f})" for n in ("arcflow", "torch")]
        print(
            f"{r['workload']:8}{r['transformer_parameters']:>14,}{r['size_px']:>6}{cells[0]:>28}{cells[1]:>28}"
            f"{r['speedup']:>9.2f}x  images differ by {r['image_difference_levels']:.2f} levels"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"command": " ".join(sys.argv), "machine": machine, "results": results}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
