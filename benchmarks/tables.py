"""Write the tables of the benchmark pages, between their markers, from the JSON results; run it without arguments."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_tables import (
    engine_memory_table,
    memory_example,
    memory_modes_table,
    memory_parts_table,
    memory_sentence,
)
from records import machine_line, read
from speed_tables import cpu_table, host_table, lora_table, quickest, serve_table, soak_lines
from student_tables import (
    SHAPES,
    arcs_table,
    convergence_table,
    eval_table,
    recipe_table,
    speedup_table,
    trained_table,
)

HERE = Path(__file__).parent
README = HERE / "README.md"
#: Size of the FP8 bundle that the rehearsal writes; its record does not have it.
QUANTIZED_SIZE = "25.1 GB"


def run_table() -> str:
    """Every measured run, for the project's README: student, stage, engine, disk, memory and time."""
    cpu = {r["workload"]: r for r in read("cpu_vs_torch")["results"]}
    exports = {name: read(f"export_{name}") for name in ("flux", "qwen")}
    stages = read("rehearsal_flux")["stages"]
    whole = read("full_image_flux")
    soak = {name: read(f"soak_{name}")["results"]["rows"][-1] for name in ("python", "cpp")}
    cpp = next(r for r in read("host_time")["results"] if r["runtime"] == "cpp")
    training_s = sum(json.loads((SHAPES / "recipe.json").read_text())["seconds"].values())
    drift = json.loads((HERE.parent / "docs" / "drift" / "shapes" / "drift.json").read_text())
    shapes_bytes = sum(path.stat().st_size for path in SHAPES.rglob("*.safetensors"))

    def image(name: str, what: str) -> list[str]:
        (ours, own), (peer, theirs) = (quickest(cpu[name], kind) for kind in ("arcflow", "PyTorch"))
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

    engine = f"{read('quantize_flux')['build']['bytes'] / 1e9:.1f} GB"
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
        r = read(f"export_{name}")
        e, c = r["export"], r["criterion"]
        verdict = "" if c["wall_met"] else " (missed)"
        rows.append(
            f"| {name} | {r['checkpoint']['bytes'] / 1e9:.1f} GB, {r['checkpoint']['fill']} "
            f"| {r['bundle_bytes'] / 1e9:.1f} GB | {r['copy']['seconds']:.0f} s "
            f"(of the {r['copy']['of']}; {', '.join(f'{v:.0f} {k}' for k, v in r['copy']['runs_s'].items())}) "
            f"| {e['trace_s']:.0f} s | {e['other_s']:.0f} s | {e['wall_s']:.0f} s "
            f"| {c['max_wall_s']:.0f} s{verdict} | {e['peak_resident_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join([*rows, "", machine_line(read("export_flux"))])


def quantize_table() -> str:
    """The full-size FLUX backbone in FP8, and its engine."""
    r = read("quantize_flux")
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
    return "\n".join([*rows, "", f"{machine_line(r)} Load average before: {load}."])


def full_image_table() -> str:
    """An image of a full-size FLUX in int8: the parts, and the time of each stage beside that of its arithmetic."""
    r = read("full_image_flux")
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
    return "\n".join([*rows, "", note, "", f"{machine_line(r)} Load average before generating: {load}."])


def rehearsal_table() -> str:
    """Every stage of a full-size student, beside its estimate."""
    r = read("rehearsal_flux")
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
    return "\n".join([*rows, "", f"{machine_line(r)} {note}"])


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
