"""Write the tables of the benchmark pages, between their markers, from the JSON results; run it without arguments."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.parse import parse
from arcflow_runtime.engines.modes import EVERY_IMAGE, MODES, TENSORRT
from arcflow_runtime.memory.choice import GB, choose_mode, fitting_mode, gigabytes
from arcflow_runtime.memory.sums import ImageSize, Sums, make_sums

HERE = Path(__file__).parent
README, RESULTS = HERE / "README.md", HERE / "results"
SHAPES = HERE.parent / "models" / "shapes"
#: Size of the FP8 bundle that the rehearsal writes; its record does not have it.
QUANTIZED_SIZE = "25.1 GB"


def run_table() -> str:
    """Every measured run, for the project's README: student, stage, engine, disk, memory and time."""
    cpu = {r["workload"]: r for r in _read("cpu_vs_torch")["results"]}
    exports = {name: _read(f"export_{name}") for name in ("flux", "qwen")}
    stages = _read("rehearsal_flux")["stages"]
    whole = _read("full_image_flux")
    soak = {name: _read(f"soak_{name}")["results"]["rows"][-1] for name in ("python", "cpp")}
    cpp = next(r for r in _read("host_time")["results"] if r["runtime"] == "cpp")
    training_s = sum(json.loads((SHAPES / "recipe.json").read_text())["seconds"].values())
    drift = json.loads((HERE.parent / "docs" / "drift" / "shapes" / "drift.json").read_text())
    shapes_bytes = sum(path.stat().st_size for path in SHAPES.rglob("*.safetensors"))

    def image(name: str, what: str) -> list[str]:
        (ours, own), (peer, theirs) = (_best(cpu[name], kind) for kind in ("arcflow", "PyTorch"))
        times = own["median_ms"], theirs["median_ms"]
        took, other = (f"{ms:.1f} ms" if max(times) < 1e3 else f"{ms / 1e3:.2f} s" for ms in times)
        return [what, "one image", ours.removeprefix("arcflow, "), "", "", f"{took} ({peer}: {other})"]

    def peak(measured: dict[str, Any]) -> str:
        return f"{measured['peak_resident_bytes'] / 2**30:.1f} GiB"

    def export(name: str) -> list[str]:
        measured = exports[name]["export"]
        size = f"{exports[name]['bundle_bytes'] / 1e9:.1f} GB"
        return ["export in bfloat16", "", size, peak(measured), f"{measured['wall_s']:.0f} s"]

    def stage(name: str, what: str, engine: str, size: str = "") -> list[str]:
        return ["", what, engine, size, peak(stages[name]), f"{stages[name]['wall_s']:,.0f} s"]

    def resident(name: str) -> str:
        return f"{soak[name]['resident_bytes'] / 2**20:.0f} MiB"

    engine = f"{_read('quantize_flux')['build']['bytes'] / 1e9:.1f} GB"
    medium = f"medium FLUX, {cpu['medium']['transformer_parameters'] / 1e6:.0f} M parameters, random weights"
    count = f"{drift['settings']['count']:,} images"
    rows = [
        ["student", "what ran", "engine", "disk", "peak memory", "time"],
        ["---"] * 6,
        ["shapes, trained, 64 px", "training from nothing", "PyTorch", "", "", f"{training_s / 60:.0f} min"],
        ["", f"{count} in float32, {count} in FP8", "ONNX Runtime", f"{shapes_bytes / 1e6:.0f} MB", "", ""],
        image("tiny", "tiny FLUX, random weights, 64 px"),
        ["", f"{soak['python']['images']:,} images", "ONNX Runtime", "", resident("python"), ""],
        ["", f"{soak['cpp']['images']:,} images in C++", "OpenVINO", "", resident("cpp"), ""],
        ["", "one image in C++, besides the engine", "OpenVINO", "", "", f"{cpp['median_ms']:.2f} ms"],
        image("medium", f"{medium}, {cpu['medium']['size_px']} px"),
        ["FLUX.1-dev's sizes, random weights", *export("flux")],
        stage("calibrate", "calibration, one prompt of 256 px", "PyTorch"),
        stage("quantize", "quantisation to FP8", "", QUANTIZED_SIZE),
        stage("verify", "drift gate, one prompt of 256 px", "ONNX Runtime"),
        stage("build", "building the backbone's engine for RTX 40 cards", "TensorRT-RTX", engine),
        [
            *("", f"one image of {whole['size_px']} px in int8", "ONNX Runtime"),
            *(f"{whole['disk_bytes'] / 1e9:.1f} GB", peak(whole["generate"]), f"{whole['generate']['wall_s']:.0f} s"),
        ],
        [f"Qwen-Image's sizes, {exports['qwen']['checkpoint']['fill']} weights", *export("qwen")],
    ]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def export_table() -> str:
    """Full-size exports, one row per model."""
    rows = [
        "| model | checkpoint | bundle | plain copy | tracing | everything else | export | at most | peak resident |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("flux", "qwen"):
        r = _read(f"export_{name}")
        e, c = r["export"], r["criterion"]
        verdict = "" if c["wall_met"] else " (missed)"
        rows.append(
            f"| {name} | {r['checkpoint']['bytes'] / 1e9:.1f} GB, {r['checkpoint']['fill']} "
            f"| {r['bundle_bytes'] / 1e9:.1f} GB | {r['copy']['seconds']:.0f} s "
            f"(of the {r['copy']['of']}; {', '.join(f'{v:.0f} {k}' for k, v in r['copy']['runs_s'].items())}) "
            f"| {e['trace_s']:.0f} s | {e['other_s']:.0f} s | {e['wall_s']:.0f} s "
            f"| {c['max_wall_s']:.0f} s{verdict} | {e['peak_resident_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join([*rows, "", _machine(_read("export_flux"))])


def quantize_table() -> str:
    """The full-size FLUX backbone in FP8, and its engine."""
    r = _read("quantize_flux")
    row, used, built = r["coverage"], r["quantize"], r["build"]
    rows = [
        "| stage | what | size | time | peak resident |",
        "|---|---|---|---|---|",
        f"| quantise | {row['quantized_linears']} of {row['linears']} linears, "
        f"{row['quantized_parameters'] / row['parameters']:.1%} of {row['parameters'] / 1e9:.2f} B parameters "
        f"| {row['bytes_before'] / 1e9:.2f} GB to {row['bytes_after'] / 1e9:.2f} GB | {used['wall_s']:.0f} s "
        f"({used['user_s'] + used['system_s']:.0f} s of CPU) | {used['peak_resident_bytes'] / 2**30:.2f} GiB |",
        f"| build | TensorRT-RTX engine for {built['target']}, 1024 px | {built['bytes'] / 1e9:.2f} GB "
        f"| {built['wall_s']:.0f} s ({built['user_s'] + built['system_s']:.0f} s of CPU) "
        f"| {built['peak_resident_bytes'] / 2**30:.2f} GiB |",
    ]
    load = ", ".join(f"{x:.1f}" for x in r["machine"]["load_average"])
    return "\n".join([*rows, "", f"{_machine(r)} Load average before: {load}."])


def full_image_table() -> str:
    """An image of a full-size FLUX in int8: the parts, and the time of each stage beside that of its arithmetic."""
    r = _read("full_image_flux")
    rows = ["| part | float32 | int8 | export | quantisation | peak resident |", "|---|---|---|---|---|---|"]
    for p in r["parts"]:
        q = p["quantize"]
        rows.append(
            f"| {p['part']} | {p['float32_bytes'] / 1e9:.2f} GB | {p['bytes'] / 1e9:.2f} GB | {p['export_s']:.0f} s "
            f"| {q['wall_s']:.0f} s | {q['peak_resident_bytes'] / 2**30:.2f} GiB |"
        )
    rows += ["", "| stage | time | operations | these in int8 at full speed |", "|---|---|---|---|"]
    stages = {
        "encode": ("text_encoder", "text_encoder_2"),
        "condition": ("conditioner",),
        "backbone": ("backbone",),
        "decode": ("vae_decoder",),
    }
    used, speed = r["generate"], r["floor"]["per_second"]
    times = used["printed"]["timings_ms"]
    for name, parts in stages.items():
        count = sum(r["floor"]["operations"][part] for part in parts)
        kind = "float32" if name == "decode" else "int8"
        note = " (float32)" if kind == "float32" else ""
        rows.append(
            f"| {name} | {times[name] / 1e3:.0f} s | {count / 1e12:.2f} T | {count / speed[kind]:.1f} s{note} |"
        )
    load = ", ".join(f"{x:.1f}" for x in r["machine"]["load_average_generating"])
    note = (
        f"All parts take {r['disk_bytes'] / 1e9:.2f} GB. The image of {r['size_px']} px in {r['steps']} steps took "
        f"{used['wall_s']:.0f} s; stages include loading their parts. Peak resident memory was "
        f"{used['peak_resident_bytes'] / 2**30:.1f} GiB. In one large product ONNX Runtime does "
        f"{speed['int8'] / 1e12:.2f} T operations per second in int8, {speed['float32'] / 1e12:.2f} T in float32."
    )
    return "\n".join([*rows, "", note, "", f"{_machine(r)} Load average before generating: {load}."])


def rehearsal_table() -> str:
    """Every stage of a full-size student, beside its estimate."""
    r = _read("rehearsal_flux")
    rows = [
        "| stage | what | planned | took | CPU | planned | peak resident | read from disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    what = {
        "export": "bfloat16, 33.7 GB written",
        "calibrate": "1 prompt, 256 px, bfloat16, weights from disk",
        "quantize": f"{QUANTIZED_SIZE} written",
        "verify": "1 prompt, 256 px, piece by piece, every quantised linear",
        "build": "TensorRT-RTX, the backbone's engine for sm89",
    }
    for name, s in r["stages"].items():
        plan = s["planned"]
        rows.append(
            f"| {name} | {what[name]} | {plan['seconds']:.0f} s | {s['wall_s']:.0f} s "
            f"| {s['user_s'] + s['system_s']:.0f} s | {plan['memory_bytes'] / 2**30:.2f} GiB "
            f"| {s['peak_resident_bytes'] / 2**30:.2f} GiB | {s['read_bytes'] / 1e9:.1f} GB |"
        )
    loads = [s["load_average_before"][0] for s in r["stages"].values()]
    note = f"Load average before the stages: {', '.join(f'{load:.1f}' for load in loads)}."
    return "\n".join([*rows, "", f"{_machine(r)} {note}"])


def cpu_table() -> str:
    """This runtime's engines and PyTorch's variants, the quickest first, and what could not run."""
    data = _read("cpu_vs_torch")
    rows = [
        "| student | candidate | time, median (p10-p90) | CPU time | against the best PyTorch | image differs by |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for r in data["results"]:
        _, best = _best(r, "PyTorch")
        for name, c in sorted(r["candidates"].items(), key=lambda item: item[1]["median_ms"]):
            student = f"{r['workload']}, {r['transformer_parameters'] / 1e6:.1f} M, {r['size_px']} px"
            cpu = "" if c["cpu_ms"] is None else f"{c['cpu_ms']:.1f} ms"
            rows.append(
                f"| {student} | {name} | {c['median_ms']:.1f} ms ({c['p10_ms']:.1f}-{c['p90_ms']:.1f}) | {cpu} "
                f"| {best['median_ms'] / c['median_ms']:.2f}x | {c['image_difference_levels']:.1f} of 255 |"
            )
        notes += [f"{r['workload']}: {name} could not run ({reason})." for name, reason in r["left_out"].items()]
    stages = {r["workload"]: _best(r, "arcflow") for r in data["results"]}
    rows += ["", *notes, *[""] * bool(notes)]
    rows += ["Where the time of one image goes with the quickest engine, in milliseconds:", ""]
    names = list(next(iter(stages.values()))[1]["stages_ms"])
    rows += ["| student | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for workload, (name, found) in stages.items():
        cells = " | ".join(f"{found['stages_ms'][n]:.2f}" for n in names)
        rows.append(f"| {workload}, {name.removeprefix('arcflow, ')} | {cells} |")
    load = data["machine"].get("load_average")
    before = "" if load is None else f" Load average before: {', '.join(f'{x:.1f}' for x in load)}."
    return "\n".join([*rows, "", f"{_machine(data)}{before}"])


def _best(result: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Name and figures of the quickest candidate whose name starts with `kind`."""
    found = {name: c for name, c in result["candidates"].items() if name.startswith(kind)}
    return min(found.items(), key=lambda item: item[1]["median_ms"])


def speedup_table() -> str:
    """`make speedup`: the shapes teacher at several numbers of steps and its student, for the project's README."""
    rows = [
        "| model | network calls | network's time | speed-up | of the whole image | named right | right and clean |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in _read("speedup")["rows"]:
        model, _, steps = r["name"].partition(", ")
        kind = "teacher" if model == "shapes-teacher" else "student"
        figures = [
            *(f"{kind}, {steps}", str(r["calls"]), f"{r['stages_s']['network'] * 1e3:.1f} ms"),
            *(f"{r['network_speed_up']:.1f}x", f"{r['speed_up']:.1f}x"),
            *(f"{100 * r['named']:.1f} %", f"{100 * r['right']:.1f} %"),
        ]
        rows.append(f"| {' | '.join(figures)} |")
    return "\n".join(rows)


def host_table() -> str:
    """The time of an image outside the engines, one row per runtime."""
    data = _read("host_time")
    names = {"python": "Python, ONNX Runtime", "cpp": "C++, OpenVINO"}
    shares = list(data["results"][0]["shares_ms"])
    rows = [f"| runtime | outside engines, median (p10-p90) | {' | '.join(shares)} | engines |"]
    rows.append("|---" * (len(shares) + 3) + "|")
    for r in data["results"]:
        cells = " | ".join(f"{r['shares_ms'][share]:.3f}" for share in shares)
        rows.append(
            f"| {names[r['runtime']]} | {r['median_ms']:.3f} ms ({r['p10_ms']:.3f}-{r['p90_ms']:.3f}) "
            f"| {cells} | {r['engines_median_ms']:.2f} ms |"
        )
    return "\n".join([*rows, "", f"Medians of {r['runs']} images of {r['size_px']} px, in ms. {_machine(data)}"])


def lora_table() -> str:
    """What LoRA slots cost, one row per variant, and what a switch takes."""
    data = _read("lora")
    rows = ["| variant | time of an image | CPU time | CPU time, relative |", "|---|---|---|---|"]
    for r in data["results"]:
        relative = "1" if r["variant"] == r["relative_to"] else f"{r['cpu_ratio']:.3f}"
        rows.append(f"| {r['variant']} | {r['wall_ms']:,.0f} ms | {r['cpu_ms']:,.0f} ms | {relative} |")
    s, linears = data["switches"], data["linears"]
    load = ", ".join(f"{x:.1f}" for x in data["machine"]["load_average"])
    return "\n".join(
        [
            *rows,
            "",
            f"Medians of {data['runs']} images of {data['px']} px with {data['text_tokens']} text tokens. Slots of "
            f"{linears['attn']} linears (attn) and {linears['all']} (all). A switch to LoRAs that are prepared: "
            f"{s['prepared_ms']:.3f} ms. To prepare them, rank 16 and all linears: {s['prepare_ms']:.0f} ms; to read a "
            f"file of {s['file_bytes'] / 1e6:.1f} MB and prepare it: {s['new_file_ms']:.0f} ms; diffusers' hotswap of "
            f"the same factors from memory: {s['hotswap_ms']:.0f} ms.",
            "",
            f"{_machine(data)} Load average before: {load}.",
        ]
    )


def arcs_table() -> str:
    """Students with many modes beside students with one mode: mean and standard deviation over the seeds."""
    data = _read("arcs_vs_linear")
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
    return "\n".join([*rows, "", f"{data['iterations']:,} iterations, {data['count']:,} prompts. {_machine(data)}"])


def convergence_table() -> str:
    """Iterations that students with many modes and with one need for the same error, by seed."""
    data = _read("convergence")

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
    return "\n".join([*rows, "", f"{note} {_machine(data)}"])


def trained_table() -> str:
    """Parameters trained, of the shapes student and of the released ones."""
    data = _read("convergence")
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


#: Models of docs/memory.md, in the order of its tables.
_MODELS = {"flux": "FLUX.1-dev", "qwen": "Qwen-Image"}
#: Sizes in GB of the cards in docs/memory.md.
_CARDS_GB = (12, 16, 24, 48, 80)


def memory_parts_table() -> str:
    """Weights, bounds of activations and buffers of every part, in GB."""
    models = _read("memory")["models"]
    sides = list(models["flux"]["activations"])
    rows = [
        f"| model | part | bf16 | FP8 | {' | '.join(f'activations, {side} px' for side in sides)} |",
        "|---|---|---|---|" + "---|" * len(sides),
    ]
    for model, label in _MODELS.items():
        found = models[model]
        *_, fp8 = found["weights"].values()
        for part, nbytes in found["weights"]["bf16"].items():
            small = gigabytes(fp8[part]) if fp8[part] != nbytes else ""
            bounds = " | ".join(gigabytes(found["activations"][side][part]) for side in sides)
            rows.append(f"| {label} | {part} | {gigabytes(nbytes)} | {small} | {bounds} |")
        plans = [memory_sums(model, "bf16", side).plans["resident"] for side in sides]
        buffers = " | ".join(gigabytes(p.buffers + p.update) for p in plans)
        rows.append(f"| {label} | buffers | | | {buffers} |")
    return "\n".join(rows).replace("|  |", "| |")


def memory_modes_table() -> str:
    """What each mode needs, and which mode fits which card."""
    models = _read("memory")["models"]
    cards = " | ".join(f"{card} GB" for card in _CARDS_GB)
    rows = [f"| model | px | resident | balanced | low | {cards} |", "|---" * (5 + len(_CARDS_GB)) + "|"]
    for model, label in _MODELS.items():
        for weights in models[model]["weights"]:
            for side in models[model]["activations"]:
                sums = memory_sums(model, weights, side)
                needs = " | ".join(gigabytes(sums.peak(mode)) for mode in MODES)
                fits = " | ".join(fitting_mode(sums, card * GB) or "-" for card in _CARDS_GB)
                rows.append(f"| {label}, {weights} | {side} | {needs} | {fits} |")
    return "\n".join(rows)


def memory_example() -> str:
    """The arithmetic of one cell of the table of modes."""
    sums = memory_sums("flux", "FP8 backbone", "1024")
    parts, plan = sums.parts, sums.plans["balanced"]
    largest = max(sums.runs["balanced"], key=lambda p: parts[p].activations or 0)
    brought = max((p for p in parts if p not in EVERY_IMAGE), key=lambda p: parts[p].weights)
    items = [
        *((f"weights of {p}", parts[p].weights) for p in EVERY_IMAGE),
        (f"weights of {brought}, the largest that is brought", parts[brought].weights),
        (f"workspace, for {largest}", parts[largest].activations or 0),
        ("buffers", plan.buffers),
        ("latents, heads and sigmas of the update", plan.update),
        ("arrays of text encoders and conditioner", sum(parts[p].arrays for p in sums.by_host["balanced"])),
    ]
    assert sum(n for _, n in items) == sums.peak("balanced")
    rows = ["| item | bytes |", "|---|---|", *(f"| {what} | {n:,} |" for what, n in items)]
    return "\n".join([*rows, f"| **together** | **{sums.peak('balanced'):,}** |"])


def memory_sentence() -> str:
    """What the log says when FLUX.1-dev with an FP8 backbone is loaded on a card with 23.9 GB free."""
    _, text = choose_mode(memory_sums("flux", "FP8 backbone", "1024"), 23_900_000_000)
    return f"```text\n{text}\n```"


def memory_sums(model: str, weights: str, side: str) -> Sums:
    """The runtime's sums for one image, from the recorded manifest, weights and bounds."""
    found = _read("memory")["models"][model]
    manifest: Manifest = parse(Manifest, found["manifest"], "memory.json")
    text, steps = manifest.text.max_sequence_length, manifest.schedule.num_inference_steps
    size = ImageSize(1, int(side), int(side), text, steps)
    return make_sums(manifest, size, TENSORRT, found["weights"][weights], found["activations"][side])


def engine_memory_table() -> str:
    """Scratch memory of TensorRT-RTX's engines: of every part at the default shapes, and of the decoder by size."""
    data = _read("engine_memory")
    rows = ["| part | weights | scratch memory | build, peak resident | of it, anonymous |", "|---|---|---|---|---|"]
    for name, r in data["parts"].items():
        rows.append(
            f"| `{name}` | {r['weight_bytes'] / 1e9:.2f} GB | {max(r['activation_bytes']) / 1e9:.3f} GB "
            f"| {r['peak_resident_bytes'] / 2**30:.1f} GiB | {r['sampled_peak_anonymous_bytes'] / 2**30:.1f} GiB |"
        )
    found = {(r["size"], r["query_groups"]): max(r["activation_bytes"]) for r in data["decoder"]}
    groups = sorted({n for _, n in found})
    allocating = sum(r["allocates_when_run"] for r in [*data["parts"].values(), *data["decoder"]])
    rows += ["", "The scratch memory of the VAE decoder by `--resolutions`:", ""]
    rows += ["| pixels | as exported | " + " | ".join(f"queries in {n} groups" for n in groups[1:]) + " |"]
    rows += ["|---" * (len(groups) + 1) + "|"]
    for size in dict.fromkeys(size for size, _ in found):
        rows.append(f"| {size} | " + " | ".join(f"{found[size, n] / 1e9:.2f} GB" for n in groups) + " |")
    note = f"TensorRT-RTX {data['library']} for {data['target']}; {allocating or 'none'} of the engines"
    return "\n".join([*rows, "", f"{note} allocates memory when it runs. {_machine(data)}"])


#: Servers of benchmarks/serve.py.
_SERVERS = {
    "lanes": "the pipeline, no HTTP",
    "service": "`arcflow serve`",
    "ray": "Ray Serve",
    "triton": "Triton, raw pixels",
    "torch": "PyTorch behind FastAPI",
}


def serve_lines(data: dict[str, Any]) -> str:
    """The results of `serve.py`, one row per server and loop."""
    rows = [
        "| server | requests from | images per second | p50 | p99 | images of a batch | refused | peak resident |",
        "|---" * 8 + "|",
    ]
    for name, found in data["results"].items():
        for i, run in enumerate(found["runs"]):
            closed = run["loop"] == "closed"
            source = _clients(run) if closed else f"open loop, {run['rate_per_s']:g} per second"
            refused = sum(n for status, n in run["statuses"].items() if status != "200")
            measured = (
                [f"{run['p50_ms']:.1f} ms", f"{run['p99_ms']:.1f} ms", f"{run['mean_batch_size']:.1f}"]
                if run["p50_ms"] is not None
                else ["-"] * 3
            )
            peak = "" if i else f"{found['peak_resident_bytes'] / 2**20:.0f} MiB"
            cells = ["" if i else _SERVERS[name], source, f"{run['images_per_s']:.0f}", *measured, str(refused), peak]
            rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    rows += ["", *_beside_the_pipeline(data["results"])]
    note = f"{data['size_px']} px, {data['steps']} steps, {data['lanes']} lanes, each loop in {data['rounds']} turns"
    load = ", ".join(f"{x:.1f}" for x in data["machine"]["load_average"])
    return "\n".join([*rows, f"{note}. {_machine(data)} Load average before: {load}."])


def _beside_the_pipeline(results: dict[str, Any]) -> list[str]:
    """What the service costs, in words, where both were measured."""
    if not {"lanes", "service"} <= results.keys():
        return []
    pairs = list(zip(results["lanes"]["runs"], results["service"]["runs"], strict=True))
    closed = {alone["clients"]: (alone, service) for alone, service in pairs if alone["loop"] == "closed"}
    (few_alone, few), (many_alone, many) = closed[min(closed)], closed[max(closed)]
    more_ms = few["p50_ms"] - few_alone["p50_ms"]
    share = many["images_per_s"] / many_alone["images_per_s"]
    beside = f"At {_clients(few)}, `arcflow serve` takes {more_ms:.1f} ms more than the pipeline alone at p50"
    return [f"{beside}; at {_clients(many)}, it generates {share:.0%} of the pipeline's images per second.", ""]


def _clients(run: dict[str, Any]) -> str:
    return "1 client" if run["clients"] == 1 else f"{run['clients']} clients"


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def _machine(data: dict[str, Any]) -> str:
    m = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.1f} GiB, Python {m['python']}, {versions}."


def serve_table() -> str:
    """The service beside the pipeline alone."""
    return serve_lines(_read("serve"))


def soak_lines() -> str:
    """What was left of the requests of `serve_soak.py`."""
    data = _read("serve_soak")
    found = data["results"]
    answers, last = found["statuses"], found["rows"][-1]
    most = {name: max(row[name] for row in found["rows"]) for name in ("threads", "files")}
    wrong = sum(n for status, n in answers.items() if status != "200")
    return (
        f"{last['requests']:,.0f} requests in {found['seconds'] / 60:.0f} minutes: {answers['200']:,} replies with "
        f"images, {wrong:,} refusals of wrong requests, and {found['left']:,} clients that left. "
        f"Resident memory at the end {last['resident_bytes'] / 2**20:.0f} MiB, "
        f"{found['growth']['resident_bytes']:+.1%} from the second quarter's median to the last quarter's; "
        f"at most {most['threads']} threads and {most['files']} open files. {_machine(data)}"
    )


#: By page, what stands between the markers of each name.
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    HERE.parent / "README.md": {"speedup": speedup_table, "run": run_table},
    README: {
        "export": export_table,
        "quantize": quantize_table,
        "full image": full_image_table,
        "rehearsal": rehearsal_table,
        "cpu": cpu_table,
        "host": host_table,
        "lora": lora_table,
        "arcs": arcs_table,
        "serve": serve_table,
        "soak": soak_lines,
    },
    HERE.parent / "docs" / "engines.md": {"memory": engine_memory_table},
    HERE.parent / "docs" / "paper.md": {"convergence": convergence_table, "trained": trained_table},
    SHAPES / "README.md": {"recipe": recipe_table, "eval": eval_table},
    HERE.parent / "docs" / "memory.md": {
        "parts": memory_parts_table,
        "modes": memory_modes_table,
        "example": memory_example,
        "sentence": memory_sentence,
    },
}


def with_tables(page: Path) -> str:
    """The page's text with its tables made from the results."""
    text = page.read_text()
    for name, table in PAGES[page].items():
        found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- end -->", text, re.DOTALL)
        assert found, name
        text = f"{text[: found.start(1)]}{table()}\n{text[found.end(1) :].lstrip()}"
    return text


def main() -> int:
    """Rewrite the tables."""
    for page in PAGES:
        page.write_text(with_tables(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
