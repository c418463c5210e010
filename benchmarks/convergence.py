"""Show how fast a student learns: 16 modes against one mode (constant velocity), by the number of iterations.

    python benchmarks/convergence.py --json benchmarks/results/convergence.json --plot docs/convergence.svg

For each seed, one student of each kind is distilled with the same settings, prompts, noise and number of iterations.
After some of the iterations, the average of its weights generates held-out prompts in two steps. The error is the
squared distance from the teacher's latents after 50 steps from the same noise, over their variance. The results are
written after every student; one that is already in the file is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from machine import describe
from tqdm import tqdm

from arcflow_distill.evaluate.samplers import EulerSampler, TeacherPipeline, generate_all, noise
from arcflow_distill.train.config import Config, load_config
from arcflow_distill.train.networks import Canvas, StudentNetwork, count_by_kind
from arcflow_distill.train.policy import Policy, warp
from arcflow_distill.train.prompts import Encoder, TextBatch, collate
from arcflow_distill.train.trainer import Distillation
from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.families import facts
from arcflow_export.images.cases import draw_cases

KINDS = {"arcs": 16, "linear": 1}
REFERENCE_STEPS, EULER_STEPS = 50, (2, 4)
CASES_SEED = 3000
#: Number of the teacher's Euler steps whose error is a target.
TARGET = "4"
#: Evaluations are this factor of iterations apart.
SPACING = 2**0.5
FIRST = 8


def points(iterations: int) -> list[int]:
    """The iterations after which a student is evaluated: 0, then `FIRST`, each `SPACING` times the one before."""
    count = math.floor(math.log(iterations / FIRST, SPACING)) + 1 if iterations >= FIRST else 0
    return sorted({0, *(round(FIRST * SPACING**i) for i in range(count)), iterations})


def settings(seed: int, modes: int, iterations: int, batch: int) -> Config:
    """The settings of one student; both kinds have the same but for `modes`."""
    return load_config(
        "shapes",
        {
            "seed": seed,
            "modes": modes,
            "iterations": iterations,
            "batch_size": batch,
            "decay_iterations": iterations // 4,
            "warmup": min(100, iterations // 10),
            # Neither depends on the length of the run, so a point of the curve is the result of a shorter run.
            "schedule": "constant",
            "ema_start": 0,
        },
    )


class Held:
    """Held-out prompts with their noise, and the teacher's latents after many steps."""

    def __init__(self, base: Path, count: int) -> None:
        cases = draw_cases(count, CASES_SEED)
        teacher = TeacherPipeline(base)
        self.reference = generate_all(EulerSampler(teacher, REFERENCE_STEPS), cases.captions, cases.seeds).latents
        self.euler = {
            str(n): self.error(generate_all(EulerSampler(teacher, n), cases.captions, cases.seeds).latents)
            for n in EULER_STEPS
        }
        config = load_config("shapes")
        encoder = Encoder(base, "flux", torch.float32, torch.device("cpu"), config.max_sequence_length)
        self.text: TextBatch = collate(encoder.encode(list(cases.captions)))
        self.noise = noise(cases.seeds)
        side_px = config.resolutions[0][0]
        self.canvas = Canvas(side_px // 16, side_px // 16, config.guidance_scale)

    def error(self, latents: np.ndarray) -> float:
        """Mean squared distance from the teacher's latents, over their variance."""
        return float(np.square(latents - self.reference, dtype=np.float64).mean() / self.reference.var())


@torch.no_grad()
def score(run: Distillation, held: Held) -> float:
    """The error of the student with the average of its weights."""
    kept = {name: p.clone() for name, p in run.trained.items()}
    for name, p in run.trained.items():
        p.copy_(run.ema.tensors[name])
    x, steps = held.noise, run.config.steps
    sigmas = [float(warp(torch.tensor(1 - i / steps))) for i in range(steps + 1)]
    for start, end in pairwise(sigmas):
        begin = torch.full([len(x)], start)
        means, logweights, loggammas = run.student(x, begin, held.text, held.canvas)
        policy = Policy.from_heads(means, logweights, loggammas, start)
        x = policy.move(x, begin, torch.full([len(x)], end))
    for name, p in run.trained.items():
        p.copy_(kept[name])
    return held.error(x.numpy())


def train(config: Config, base: Path, held: Held) -> dict[str, Any]:
    """Distil one student: its errors by iteration, losses, trained parameters and seconds."""
    run = Distillation(config, base, Accelerator(mixed_precision="no", cpu=True))
    wanted, errors, losses, began = points(config.iterations), [score(run, held)], [], time.perf_counter()
    for done in tqdm(range(1, config.iterations + 1), f"{config.modes} modes, seed {config.seed}", disable=None):
        losses.append(run.iterate(done - 1).loss)
        if done in wanted:
            errors.append(score(run, held))
    return {
        "iterations": wanted,
        "latent_error": errors,
        "loss_of_last_tenth": statistics.mean(losses[-max(len(losses) // 10, 1) :]),
        "trained_parameters": count_by_kind(run.trained),
        "base_parameters": run.base_parameters,
        "seconds": round(time.perf_counter() - began, 1),
    }


def reached(row: dict[str, Any], error: float) -> float | None:
    """The iteration at which a student first has at most `error`, interpolated between evaluations; None if never."""
    pairs = list(zip(row["iterations"], row["latent_error"], strict=True))
    for (before, above), (after, below) in pairwise(pairs):
        if below <= error:
            share = math.log(above / error) / math.log(above / below) if above > error else 0.0
            return float(before + share * (after - before))
    return None


def summary(students: dict[str, dict[str, Any]], euler: dict[str, float]) -> list[dict[str, Any]]:
    """For each seed, the iterations that each kind needs for two errors, and the ratio; None if one is not reached.

    One error is that of the teacher with few steps, which is known before; the other is the worse of the best errors of
    the two kinds, which both reach.
    """
    rows = []
    for seed in range(len(students) // len(KINDS)):
        pair = [students[f"{kind}-{seed}"] for kind in KINDS]
        targets = {f"teacher, {TARGET} Euler steps": euler[TARGET]}
        targets["reached by both"] = max(min(row["latent_error"]) for row in pair)
        for name, error in targets.items():
            arcs, linear = (reached(row, error) for row in pair)
            ratio = None if arcs is None or linear is None else linear / arcs
            rows.append({"seed": seed, "target": name, "error": error, "arcs": arcs, "linear": linear, "ratio": ratio})
    return rows


def shown(iterations: float | None) -> str:
    """A number of iterations for people."""
    return "not reached" if iterations is None else f"{iterations:.0f}"


def released_shares() -> dict[str, dict[str, Any]]:
    """Parameters of the transformers of FLUX.1-dev and Qwen-Image, and those trained; counted without weights."""
    import diffusers

    shares = {}
    for preset in ("flux", "qwen"):
        config = load_config(preset)
        family = {"flux": "flux", "qwen": "qwen-image"}[preset]
        options = {"guidance_embeds": True} if preset == "flux" else {}
        with torch.device("meta"):
            transformer = getattr(diffusers, facts(family).transformer)(**options).requires_grad_(False)
            base = sum(p.numel() for p in transformer.parameters())
            student = StudentNetwork(transformer, family, config.modes, config.rank, config.lora_dropout)
        shares[preset] = {"base_parameters": base, "trained_parameters": count_by_kind(student.trained())}
    return shares


def plot(data: dict[str, Any], file: Path) -> None:
    """Draw error by iteration: every seed thin, the mean of the seeds thick, the teacher's few steps as lines."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "convergence"  # the same file for the same data
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    labels = {"arcs": "ArcFlow, 16 modes", "linear": "linear, 1 mode"}
    for kind, color in zip(KINDS, ("C0", "C1"), strict=True):
        rows = [row for name, row in data["students"].items() if name.startswith(f"{kind}-")]
        for row in rows:
            axes.plot(row["iterations"], row["latent_error"], color=color, alpha=0.35, linewidth=1)
        mean = np.mean([row["latent_error"] for row in rows], axis=0)
        axes.plot(rows[0]["iterations"], mean, color=color, linewidth=2, label=labels[kind])
    for steps, error in data["euler"].items():
        axes.axhline(error, color="gray", linestyle=":", linewidth=1)
        axes.annotate(f"teacher, {steps} Euler steps", (FIRST, error), fontsize=8, color="gray", va="bottom")
    axes.set(xlabel="iterations", ylabel="latent error", xscale="log", yscale="log", xlim=(FIRST, None))
    axes.set_xticks([FIRST * 2**i for i in range(math.floor(math.log2(data["iterations"] / FIRST)) + 1)])
    axes.set_yticks([0.02, 0.05, 0.1, 0.2])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Distil, print, write JSON and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("models/shapes/teacher"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=192, help="for each student; default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="images per iteration; default: %(default)s")
    parser.add_argument("--count", type=int, default=128, help="number of held-out prompts; default: %(default)s")
    parser.add_argument("--json", type=Path, required=True, help="write the results here, and continue from them")
    parser.add_argument("--plot", type=Path, help="SVG to draw")
    args = parser.parse_args(argv)
    quiet_libraries()
    given = {"iterations": args.iterations, "batch": args.batch, "count": args.count}
    data: dict[str, Any] = {"command": " ".join(sys.argv), "machine": describe(), **given, "students": {}}
    if args.json.exists():
        found = json.loads(args.json.read_text())
        if any(found[name] != value for name, value in given.items()):
            raise SystemExit(f"{args.json} has results of other settings; give another file or remove it")
        data |= {"students": found["students"]}
    held = Held(args.base, args.count)
    data |= {"euler": held.euler, "released": released_shares()}
    for seed in range(args.seeds):
        for kind, modes in KINDS.items():
            if (name := f"{kind}-{seed}") not in data["students"]:
                config = settings(seed, modes, args.iterations, args.batch)
                data["students"][name] = train(config, args.base, held)
                args.json.write_text(json.dumps(data, indent=2) + "\n")
    data["reached"] = summary(data["students"], held.euler)
    args.json.write_text(json.dumps(data, indent=2) + "\n")
    for name, row in data["students"].items():
        share = sum(row["trained_parameters"].values()) / row["base_parameters"]
        print(f"{name:10} latent error {row['latent_error'][-1]:.4f}, {share:.1%} of the parameters trained")
    for row in data["reached"]:
        print(f"seed {row['seed']}, {row['target']}: {row['error']:.4f} after", *(shown(row[kind]) for kind in KINDS))
    if args.plot:
        plot(data, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
