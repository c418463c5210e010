"""Compare this runtime with PyTorch on the same student: milliseconds per image on a CPU.

Every candidate of `cpu_candidates.py` runs alone in a process of its own, in rounds, so that a change in the machine's
speed affects all. An image is everything from the prompt to pixels; text embeddings are not kept between images. What
cannot run on this machine is named with its reason, on the screen and in the JSON.

    python benchmarks/cpu_vs_torch.py --json benchmarks/results/cpu_vs_torch.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_candidates import BUNDLES, CANDIDATES, REFERENCE, Ours, bundle_of
from diffusers import FluxTransformer2DModel
from machine import describe
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests" / "golden"


@dataclass(frozen=True)
class Workload:
    """One student, one request, and how many times each process repeats it."""

    name: str
    size_px: int
    text_tokens: int
    runs: int


#: About 100 million parameters in the transformer: width 768, 2 double and 6 single blocks.
MEDIUM = {
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "num_attention_heads": 12,
    "num_layers": 2,
    "num_single_layers": 6,
}
WORKLOADS = {w.name: w for w in (Workload("tiny", 64, 64, 50), Workload("medium", 512, 128, 5))}


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


def prepare(workload: Workload, folder: Path, names: list[str]) -> dict[str, str]:
    """Write the student and the bundles that the named candidates need.

    Returns:
        The candidates whose bundle cannot be made, each with the reason.
    """
    if workload.name == "medium":
        make_medium(folder)
    else:
        shutil.copytree(GOLDEN / "flux-tiny", folder)
    failed: dict[str, str] = {}
    ours = [CANDIDATES[name] for name in names]
    for precision in dict.fromkeys(c.precision for c in ours if isinstance(c, Ours)):
        if reason := _make_bundle(folder, precision):
            failed |= {c.name: reason for c in ours if isinstance(c, Ours) and c.precision == precision}
    return failed


def _make_bundle(folder: Path, precision: str) -> str | None:
    """Make a precision's bundle; returns the last line of the error, or None."""
    made, out = BUNDLES[precision], bundle_of(folder, precision)
    plain = bundle_of(folder, f"plain {precision}" if made.export else made.dtype)
    commands = []
    if not plain.exists():
        student = ["--base", str(folder / "base"), "--adapter", str(folder / "adapter")]
        commands.append(["export", *student, "--dtype", made.dtype, *made.export, "--out", str(plain)])
    if made.quantize:
        commands.append(["quantize", str(plain), *made.quantize, "--out", str(out)])
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "arcflow_runtime.cli", *command], capture_output=True, text=True)
        if done.returncode != 0:
            return _last_line(done.stderr)
    return None


def measure(workload: Workload, folder: Path, names: list[str], rounds: int) -> dict[str, Any]:
    """Run the candidates in rounds and summarise them."""
    failed = prepare(workload, folder, names)
    found: dict[str, dict[str, Any]] = {}
    for _, name in tqdm([(r, n) for r in range(rounds) for n in names], desc=workload.name, disable=None):
        if name in failed:
            continue
        image = folder / f"{list(CANDIDATES).index(name)}.npy"
        size = ["--size-px", workload.size_px, "--text-tokens", workload.text_tokens, "--runs", workload.runs]
        command = [sys.executable, HERE / "cpu_candidates.py", name, folder, *size, "--image", image]
        # torch.compile's kernels are kept between the rounds.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            failed[name] = _last_line(done.stderr)
            found.pop(name, None)
            continue
        one = json.loads(done.stdout.splitlines()[-1])
        row = found.setdefault(name, {"wall_ms": [], "cpu_ms": [], "image": image})
        row["wall_ms"] += one["wall_ms"]
        row["cpu_ms"] += one["cpu_ms"]
        row["stages_ms"] = one["stages_ms"]
    reference = np.load(found[REFERENCE]["image"]) if REFERENCE in found else None
    return {
        "workload": workload.name,
        "transformer_parameters": _parameters(folder / "base" / "transformer"),
        "size_px": workload.size_px,
        "text_tokens": workload.text_tokens,
        "steps": 2,
        "rounds": rounds,
        "runs": workload.runs * rounds,
        "candidates": {name: _summary(row, reference) for name, row in found.items()},
        "left_out": failed,
    }


def _summary(row: dict[str, Any], reference: np.ndarray | None) -> dict[str, Any]:
    deciles = statistics.quantiles(row["wall_ms"], n=10)
    difference = None if reference is None else float(np.abs(np.load(row["image"]) - reference).max()) * 255
    stages = row["stages_ms"]
    return {
        "median_ms": statistics.median(row["wall_ms"]),
        "p10_ms": deciles[0],
        "p90_ms": deciles[-1],
        "cpu_ms": statistics.median(row["cpu_ms"]),
        "image_difference_levels": difference,
        "stages_ms": stages and {name: round(ms, 3) for name, ms in stages.items()},
    }


def _parameters(folder: Path) -> int:
    from arcflow_export.checkpoint.tensors import TensorIndex

    return sum(ref.numel for ref in TensorIndex.open(folder, "transformer").values())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a message"


def main() -> int:
    """Run every workload, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", choices=list(WORKLOADS), help="run one workload")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="processes per candidate; default: %(default)s")
    args = parser.parse_args()
    results, load = [], os.getloadavg()
    with tempfile.TemporaryDirectory() as root:
        for workload in WORKLOADS.values():
            if args.only in (None, workload.name):
                results.append(measure(workload, Path(root) / workload.name, args.candidates, args.rounds))
    machine = describe(("openvino", "peft")) | {"load_average": load}
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['versions']}")
    for r in results:
        print(f"{r['workload']}, {r['transformer_parameters']:,} parameters, {r['size_px']} px, {r['runs']} runs")
        for name, c in sorted(r["candidates"].items(), key=lambda item: item[1]["median_ms"]):
            spread = f"({c['p10_ms']:.1f}-{c['p90_ms']:.1f})"
            print(f"  {name:36}{c['median_ms']:>10.1f} ms {spread:>18}, processors {c['cpu_ms']:.0f} ms")
        for name, reason in r["left_out"].items():
            print(f"  {name:36} left out: {reason}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"command": " ".join(sys.argv), "machine": machine, "results": results}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
