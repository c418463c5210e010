"""Tables of students: speed-up, scores, convergence, and how the shapes model was trained."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from records import machine_line, read

SHAPES = Path(__file__).parents[1] / "models" / "shapes"


def speedup_table() -> str:
    """`make speedup`: the shapes teacher at several numbers of steps and its student, for the project's README."""
    rows = [
        "| model | network calls | network's time | speed-up | of the whole image | named right | right and clean |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in read("speedup")["rows"]:
        model, _, steps = r["name"].partition(", ")
        kind = "teacher" if model == "shapes-teacher" else "student"
        figures = [
            *(f"{kind}, {steps}", str(r["calls"]), f"{r['stages_s']['network'] * 1e3:.1f} ms"),
            *(f"{r['network_speed_up']:.1f}x", f"{r['speed_up']:.1f}x"),
            *(f"{100 * r['named']:.1f} %", f"{100 * r['right']:.1f} %"),
        ]
        rows.append(f"| {' | '.join(figures)} |")
    return "\n".join(rows)


def arcs_table() -> str:
    """Students with many modes beside students with one mode: mean and standard deviation over the seeds."""
    data = read("arcs_vs_linear")
    results = data["results"]
    subsets = [name for name in results["teacher-50"] if name != "all"]
    kinds = {"arcs": "ArcFlow, 16 modes", "linear": "linear, 1 mode", "euler-4": "teacher, 4 Euler steps"}
    kinds["euler-2"] = "teacher, 2 Euler steps"

    def cell(kind: str, subset: str, quantity: str, scale: float, digits: int) -> str:
        values = [scale * r[subset][quantity] for name, r in results.items() if name.rpartition("-")[0] == kind]
        if not values:
            return f"{scale * results[kind][subset][quantity]:.{digits}f}"
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    rows = ["| sampler | named right, % | right and clean, % | latent error | Fréchet |", "|---|---|---|---|---|"]
    for kind, label in kinds.items():
        cells = (("named", 100, 1), ("right", 100, 1), ("latent_error", 1, 4), ("frechet", 1, 1))
        rows.append(f"| {label} | {' | '.join(cell(kind, 'all', *c) for c in cells)} |")
    rows += ["", "Latent error by group of prompts, and by how many of the five attributes the prompt leaves open:", ""]
    rows += [f"| sampler | {' | '.join(subsets)} |", "|---" * (len(subsets) + 1) + "|"]
    for kind, label in kinds.items():
        rows.append(f"| {label} | {' | '.join(cell(kind, s, 'latent_error', 1, 4) for s in subsets)} |")
    return "\n".join([*rows, "", f"{data['iterations']:,} iterations, {data['count']:,} prompts. {machine_line(data)}"])


def convergence_table() -> str:
    """Iterations that students with many modes and with one need for the same error, by seed."""
    data = read("convergence")

    def cell(value: float | None, digits: int) -> str:
        return "not reached" if value is None else f"{value:.{digits}f}"

    rows = ["| latent error | seed | iterations, 16 modes | iterations, 1 mode | ratio |", "|---" * 5 + "|"]
    for found in sorted(data["reached"], key=lambda row: row["target"], reverse=True):
        counts = (cell(found["arcs"], 0), cell(found["linear"], 0), cell(found["ratio"], 2))
        rows.append(f"| {found['error']:.4f} ({found['target']}) | {found['seed']} | {' | '.join(counts)} |")
    rows += ["", "| seed | lowest error, 16 modes | lowest error, 1 mode |", "|---" * 3 + "|"]
    for seed in sorted({row["seed"] for row in data["reached"]}):
        lowest = (min(data["students"][f"{kind}-{seed}"]["latent_error"]) for kind in ("arcs", "linear"))
        rows.append(f"| {seed} | {' | '.join(f'{error:.4f}' for error in lowest)} |")
    note = f"{data['iterations']:,} iterations of {data['batch']} images, {data['count']:,} held-out prompts."
    return "\n".join([*rows, "", f"{note} {machine_line(data)}"])


def trained_table() -> str:
    """Parameters trained, of the shapes student and of the released ones."""
    data = read("convergence")
    counts = {"shapes, rank 32": data["students"]["arcs-0"], "shapes, rank 32, one mode": data["students"]["linear-0"]}
    counts |= {"FLUX.1-dev, rank 256": data["released"]["flux"], "Qwen-Image, rank 256": data["released"]["qwen"]}
    rows = ["| student | network | trained | share |", "|---|---|---|---|"]
    for name, row in counts.items():
        trained, base = sum(row["trained_parameters"].values()), row["base_parameters"]
        rows.append(f"| {name} | {base:,} | {trained:,} | {trained / base:.1%} |")
    return "\n".join(rows)


def recipe_table() -> str:
    """The training time of the shapes model by stage."""
    seconds = json.loads((SHAPES / "recipe.json").read_text())["seconds"]
    rows = ["| stage | minutes |", "|---|---|"]
    rows += [f"| {stage} | {s / 60:.1f} |" for stage, s in seconds.items()]
    return "\n".join([*rows, f"| all | {sum(seconds.values()) / 60:.0f} |"])


def eval_table() -> str:
    """The shapes model's evaluation, with headings one level deeper than in its own file."""
    return (SHAPES / "eval" / "table.md").read_text().strip().replace("## ", "### ")
