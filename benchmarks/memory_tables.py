"""Tables of memory: what each mode needs on which card, and the scratch memory of engines."""

from __future__ import annotations

from records import machine_line, read

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.parse import parse
from arcflow_runtime.engines.modes import EVERY_IMAGE, MODES, TENSORRT
from arcflow_runtime.memory.choice import GB, choose_mode, fitting_mode, gigabytes
from arcflow_runtime.memory.sums import ImageSize, Sums, make_sums

#: Models of docs/memory.md, in the order of its tables.
_MODELS = {"flux": "FLUX.1-dev", "qwen": "Qwen-Image"}
#: Sizes in GB of the cards in docs/memory.md.
_CARDS_GB = (12, 16, 24, 48, 80)


def memory_parts_table() -> str:
    """Weights, bounds of activations and buffers of every part, in GB."""
    models = read("memory")["models"]
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
    models = read("memory")["models"]
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
    found = read("memory")["models"][model]
    manifest: Manifest = parse(Manifest, found["manifest"], "memory.json")
    text, steps = manifest.text.max_sequence_length, manifest.schedule.num_inference_steps
    size = ImageSize(1, int(side), int(side), text, steps)
    return make_sums(manifest, size, TENSORRT, found["weights"][weights], found["activations"][side])


def engine_memory_table() -> str:
    """Scratch memory of TensorRT-RTX's engines: of every part at the default shapes, and of the decoder by size."""
    data = read("engine_memory")
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
    return "\n".join([*rows, "", f"{note} allocates memory when it runs. {machine_line(data)}"])
