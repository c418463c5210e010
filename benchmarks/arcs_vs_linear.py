"""Show the gain of curved paths: students with 16 modes against students with one mode (constant velocity).

    python benchmarks/arcs_vs_linear.py --work out/arcs --json benchmarks/results/arcs_vs_linear.json

Teacher and iterations are the same. For each seed, one student of each kind is distilled, both at once with half of the
cores each. Students that already exist in --work are reused. All generate the same prompts from the same noise as the
teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from tqdm import tqdm

from arcflow_distill.evaluate.options import STUDENT_STEPS
from arcflow_distill.evaluate.samplers import EulerSampler, Generated, Sampler, TeacherPipeline, generate_all
from arcflow_distill.evaluate.students import AdapterSampler
from arcflow_distill.shapes.loop import cores, environment
from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.images.cases import GROUPS, Cases, draw_cases, real_images
from arcflow_export.images.judge import Judge, to_tensor
from arcflow_export.images.scenes import ATTRIBUTES
from arcflow_export.images.statistics import frechet, moments

KINDS = {"arcs": 16, "linear": 1}
REFERENCE_STEPS, EULER_STEPS = 50, (4, 2)
QUANTITIES = ("named", "right", "latent_error", "frechet")


def distil(model: Path, work: Path, seed: int, iterations: int) -> None:
    """Train the missing students of one seed; the teacher's share is 0 after a quarter of the training."""
    running = []
    for kind, modes in KINDS.items():
        out = work / f"{kind}-{seed}"
        if not out.exists():
            command = [
                sys.executable,
                "-m",
                "arcflow_runtime.cli",
                "distill",
                "shapes",
                "--base",
                str(model / "teacher"),
            ]
            command += ["--out", str(out), "--seed", str(seed), "--modes", str(modes), "--overwrite"]
            command += ["--iterations", str(iterations), "--set", f"decay_iterations={iterations // 4}"]
            log = (work / f"{kind}-{seed}.log").open("w")
            process = subprocess.Popen(command, env=environment(cores() // 2), stdout=log, stderr=log)
            running.append((process, log))
    for process, log in running:
        if process.wait():
            raise SystemExit(f"a distillation failed; see {log.name}")


def score(cases: Cases, generated: Generated, reference: Generated, judge: Judge, real: np.ndarray) -> dict[str, Any]:
    """Shares, latent error and Frechet distance: for all prompts, by group, and by number of unnamed attributes."""
    reading = judge.read(to_tensor(generated.images))
    named, right = reading.named(cases.words).numpy(), reading.right(cases.words).numpy()
    error = np.square(generated.latents - reference.latents, dtype=np.float64).mean((1, 2)) / reference.latents.var()
    features = reading.features.numpy()
    open_attributes = np.array([len(ATTRIBUTES) - len(words) for words in cases.words])
    subsets = {group: np.isin(np.arange(len(cases)), cases.rows(group)) for group in GROUPS}
    subsets |= {f"{n} open": open_attributes == n for n in sorted(set(open_attributes.tolist()))}
    subsets["all"] = np.ones(len(cases), bool)
    rows: dict[str, Any] = {
        name: {
            "images": int(m.sum()),
            "named": float(named[m].mean()),
            "right": float(right[m].mean()),
            "latent_error": float(error[m].mean()),
        }
        for name, m in subsets.items()
    }
    rows["all"]["frechet"] = frechet(*moments(features), *moments(real))
    return rows


def summary(results: dict[str, dict[str, Any]], kind: str, subset: str, quantity: str) -> tuple[float, float]:
    """The mean and standard deviation of a quantity over the seeds."""
    values = [rows[subset][quantity] for name, rows in results.items() if name.startswith(f"{kind}-")]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Distil, generate, score, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/shapes"), help="directory of teacher and judge")
    parser.add_argument("--work", type=Path, required=True, help="students are written here")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=5000, help="for each student; default: %(default)s")
    parser.add_argument("--count", type=int, default=1024, help="number of prompts; default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(range(args.seeds), "distilling"):
        distil(args.model, args.work, seed, args.iterations)

    judge, teacher = Judge.load(args.model / "judge"), TeacherPipeline(args.model / "teacher")
    cases = draw_cases(args.count, seed=2000)
    real = judge.read(real_images(cases, 2001)).features.numpy()
    samplers: dict[str, Sampler] = {f"euler-{n}": EulerSampler(teacher, n) for n in EULER_STEPS}
    for seed in range(args.seeds):
        for kind in KINDS:
            samplers[f"{kind}-{seed}"] = AdapterSampler(args.model / "teacher", args.work / f"{kind}-{seed}")
    reference = generate_all(EulerSampler(teacher, REFERENCE_STEPS), cases.captions, cases.seeds)
    results = {"teacher-50": score(cases, reference, reference, judge, real)}
    for name, sampler in tqdm(samplers.items(), "generating"):
        generated = generate_all(sampler, cases.captions, cases.seeds)
        results[name] = score(cases, generated, reference, judge, real)
    machine = describe()
    print(f"{machine['cpu']}, {machine['cores']} cores; {args.count} prompts, {STUDENT_STEPS} steps")
    for name, rows in results.items():
        shown = (f"{quantity} {rows['all'][quantity]:.4f}" for quantity in QUANTITIES)
        print(f"{name:12} {'  '.join(shown)}")
    for kind in KINDS:
        for quantity in QUANTITIES:
            print(f"{kind:8} {quantity:13} {'{:.4f} +- {:.4f}'.format(*summary(results, kind, 'all', quantity))}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "command": " ".join(sys.argv),
            "machine": machine,
            "iterations": args.iterations,
            "count": args.count,
            "results": results,
        }
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
