"""Estimate time, memory and disk of each stage, from counts of its work and the machine's speeds.

The commands print these estimates and refuse a stage that cannot fit. The counts are known before the stage starts:
operations, bytes read and written, tensors. Their factors were measured with FLUX.1-dev's sizes and with the small
students (`benchmarks/rehearsal.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_export.costs.machine import Machine
from arcflow_export.costs.work import PartWork
from arcflow_export.emulate.blocks import PIECE_BYTES
from arcflow_export.errors import ExportError
from arcflow_export.student.memory import stays_on_disk
from arcflow_runtime.build.cost import builder_bytes, builder_seconds

GIB = 1 << 30
#: Resident memory of a process that has imported the libraries of export and the gate.
_IMPORTED_BYTES = 7 * GIB // 10
#: Resident memory of a process that has imported torch and diffusers only.
_TORCH_BYTES = 9 * GIB // 20
#: Seconds that such a process takes to start, on a machine that runs `_STEPS` simple Python statements per second.
_START_S, _STEPS = 12.0, 33e6


#: Seconds to trace and convert the graph per parameter tensor; each tensor has about four operators.
_TRACE_S = 0.05
#: Elements per second of one pass over a weight while it is merged, quantised or widened.
_ELEMENTS = 1.2e9
#: Number of values of the largest size in memory at once. In the gate: a node's input and output, and both rounded. In
#: torch: input, output, and the copy that a calibrator compares.
_VALUES, _TORCH_VALUES = 4, 3
#: Time of a network over the time of its matrix products: norms, activations and rotations add to it, and in the gate
#: the rounding of every result.
_TORCH, _EMULATED = 1.25, 1.4


@dataclass(frozen=True)
class Cost:
    """The estimate for one stage: `memory_bytes` is the peak of its process, `disk_bytes` what it adds to the disk.

    `seconds` is None if the time is unknown, as for a download. `smaller` tells the user how to make the stage fit.
    """

    stage: str
    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    smaller: str = ""

    def sentence(self) -> str:
        """The estimate as one line for the terminal."""
        time = "" if self.seconds is None else f"about {duration(self.seconds)}, "
        disk = f", {self.disk_bytes / 1e9:.1f} GB of disk" if self.disk_bytes >= 5e7 else ""
        return f"{self.stage}: {time}{self.memory_bytes / GIB:.1f} GiB of memory{disk}"


def misfit(cost: Cost, machine: Machine) -> str | None:
    """If a stage cannot fit, a sentence that says why and what to do; else None."""
    for what, unit, scale, needed, free in (
        ("memory", "GiB", GIB, cost.memory_bytes, machine.free_memory_bytes),
        ("disk", "GB", 1e9, cost.disk_bytes, machine.free_disk_bytes),
    ):
        if needed > free:
            remedy = cost.smaller if what == "memory" and cost.smaller else f"free some {what}, or use another machine"
            return f"{cost.stage} needs {needed / scale:.1f} {unit} of {what}, {free / scale:.1f} are free; {remedy}"
    return None


def check_fits(cost: Cost, machine: Machine) -> None:
    """Check that a stage fits, before it starts.

    Raises:
        ExportError: it does not fit; the message says what is needed, what is free, and what to do.
    """
    if (said := misfit(cost, machine)) is not None:
        raise ExportError(f"{said} (--anyway starts it nevertheless)")


def duration(seconds: float) -> str:
    """Seconds as readable text: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def export_cost(
    parts: Mapping[str, PartWork], base_bytes: int, adapter_bytes: int, width: int, machine: Machine
) -> Cost:
    """Estimate an export: tracing without weights, then every weight is read, merged and written once, block by block.

    Args:
        parts: the parts that are written.
        base_bytes: bytes of the base's weights.
        adapter_bytes: bytes of the adapter's and LoRAs' weights, assumed to be bfloat16.
        width: width of the transformer. B A of a LoRA with rank r takes 2 r in out operations for r (in + out)
            parameters, and in out / (in + out) is about 0.8 of the width in both networks.
        machine: free resources and speeds.
    """
    merged_flops = adapter_bytes / 2 * 2 * 0.8 * width
    written = sum(p.weight_bytes for p in parts.values())
    elements = sum(p.parameters for p in parts.values())
    tensors = sum(p.tensors for p in parts.values())
    # One thread reads and merges while another writes and hashes.
    merging = (base_bytes + adapter_bytes) / machine.read
    merging += merged_flops / machine.float32_flops + elements / _ELEMENTS
    writing = written / machine.write + written / machine.hash
    seconds = _start(machine, _START_S + _TRACE_S * tensors) + max(merging, writing)
    # In addition to the imports: graphs without weights, and a few blocks of the largest weights in float32.
    return Cost("export", seconds, _IMPORTED_BYTES + tensors * 300_000 + (192 << 20), written)


def network_bytes(
    parts: Mapping[str, PartWork],
    base_bytes: int,
    adapter_bytes: int,
    dtype: str,
    batch: int,
    steps: int,
    free_bytes: int,
) -> tuple[int, int]:
    """Memory of a student in torch without the imports, and the bytes of weights read for each batch of prompts.

    If the weights do not fit in memory, they are read from disk as they are used: the text encoders' once, and the
    transformer's at every step.
    """
    item = _ITEM[dtype]
    weights = item * sum(p.parameters for p in parts.values()) + adapter_bytes * item // 2
    activations = batch * _TORCH_VALUES * item * max(p.activation for n, p in parts.items() if n != "vae_decoder")
    if not stays_on_disk(weights, free_bytes):
        return weights + activations, 0
    # One weight is in memory at a time, plus the stored tensor if it is cast. The adapter is read when the transformer
    # runs, after the text encoders.
    stored = item if item == 2 else item + 2
    text = max(stored * p.largest for name, p in parts.items() if name.startswith("text_encoder"))
    network = max(stored * parts[name].largest for name in ("backbone", "conditioner"))
    transformer = 2 * (parts["backbone"].parameters + parts["conditioner"].parameters)
    memory = max(text, adapter_bytes * item // 2 + network) + activations
    return memory, base_bytes + (steps - 1) * transformer


def calibrate_cost(
    parts: Mapping[str, PartWork],
    prompts: int,
    steps: int,
    dtype: str,
    read_bytes: int,
    memory_bytes: int,
    machine: Machine,
) -> Cost:
    """Estimate a calibration: every prompt goes through text encoders and backbone in torch.

    Args:
        parts: the parts, with the operations for calibration's image size.
        prompts: number of prompts.
        steps: network calls per prompt.
        dtype: dtype of weights and activations.
        read_bytes: bytes of weights read from disk in total.
        memory_bytes: bytes of weights and activations.
        machine: free resources and speeds.
    """
    text = sum(p.flops for name, p in parts.items() if name.startswith("text_encoder"))
    flops = prompts * (text + steps * parts["backbone"].flops)
    speed = machine.bfloat16_flops if dtype == "bfloat16" else machine.float32_flops
    seconds = _start(machine, 2 * _START_S) + _TORCH * flops / speed + read_bytes / machine.read
    smaller = "give --limit, --batch 1 or smaller --sizes"
    return Cost("calibrate", seconds, _TORCH_BYTES + memory_bytes, 10 << 20, smaller)


def quantize_cost(
    parts: Mapping[str, PartWork], chosen: Mapping[str, int], unchanged_bytes: int, machine: Machine
) -> Cost:
    """Estimate a quantisation: weights of quantised parts are read twice and written once; other files are copied.

    Args:
        parts: the bundle's parts.
        chosen: by part, the number of elements that become FP8.
        unchanged_bytes: bytes of the files that are copied.
        machine: free resources and speeds.
    """
    read = sum(2 * parts[name].weight_bytes for name in chosen) + unchanged_bytes
    written = unchanged_bytes + sum(
        parts[name].weight_bytes - elements * (_ITEM[parts[name].precision] - 1) for name, elements in chosen.items()
    )
    elements = sum(chosen.values())
    hashed = sum(parts[name].weight_bytes for name in chosen) + written - unchanged_bytes
    # Ranges and FP8 values are computed while the kernel writes earlier data.
    working = read / machine.read + hashed / machine.hash + 4 * elements / _ELEMENTS
    seconds = _start(machine, _START_S) + max(working, written / machine.write)
    return Cost("quantize", seconds, _IMPORTED_BYTES + (384 << 20), written)


def verify_cost(
    parts: Mapping[str, PartWork],
    cases: int,
    steps: int,
    roundings: int,
    base_bytes: int,
    adapter_bytes: int,
    machine: Machine,
) -> Cost:
    """Estimate a comparison with torch: the bundle runs twice, torch three times in float32 and twice per rounding."""
    text = sum(p.flops for name, p in parts.items() if name.startswith("text_encoder"))
    flops = cases * (text + steps * parts["backbone"].flops + parts["vae_decoder"].flops)
    memory, read = network_bytes(parts, base_bytes, adapter_bytes, "float32", 1, steps, machine.free_memory_bytes)
    seconds = _start(machine, 2 * _START_S) + flops * (2 * _EMULATED + 3 * _TORCH) / machine.float32_flops
    seconds += 2 * roundings * _TORCH * flops / machine.bfloat16_flops
    seconds += cases * (3 + 2 * roundings) * read / machine.read
    small = (min(4 * p.parameters, PIECE_BYTES) for p in parts.values())
    memory = _IMPORTED_BYTES + (1 + (roundings > 0)) * memory + 2 * sum(small)
    return Cost("verify", seconds, memory, 0, "give fewer --prompt, or --height and --width of smaller images")


@dataclass(frozen=True)
class GateWork:
    """The work of a drift gate: cases, steps, and which files differ between its bundles.

    `layers` is the share of the backbone's operations that is in quantised linears. `kept_bytes` is the memory for the
    cases that are compared together.
    """

    cases: int
    steps: int
    text_differs: bool
    decoder_differs: bool
    layers: float
    kept_bytes: int
    end_to_end: bool = True


def gate_cost(parts: Mapping[str, PartWork], gate: GateWork, machine: Machine) -> Cost:
    """Estimate a drift gate: both bundles run on this CPU in float32, the candidate's backbone twice. Each quantised
    linear runs once more beside the reference's.
    """
    text = sum(p.flops for name, p in parts.items() if name.startswith("text_encoder"))
    own = gate.end_to_end * (gate.steps - (not gate.text_differs))
    layered = gate.layers > 0
    calls = gate.steps * (2 + layered * (1 + gate.layers)) + own
    flops = (1 + gate.text_differs) * text + calls * parts["backbone"].flops
    flops += (2 + gate.decoder_differs) * parts["vae_decoder"].flops
    sweeps = gate.steps * (2 + 2 * layered)
    widened = sweeps * parts["backbone"].parameters + 2 * sum(p.parameters for p in parts.values())
    read = sweeps * parts["backbone"].weight_bytes + 2 * sum(p.weight_bytes for p in parts.values())
    seconds = _start(machine, 2 * _START_S) + _EMULATED * gate.cases * flops / machine.float32_flops
    seconds += widened / _ELEMENTS + read / machine.read
    weights = max(map(_piece_bytes, parts.values()))
    activations = _VALUES * 4 * max(p.activation for p in parts.values())
    memory = _IMPORTED_BYTES + weights + gate.kept_bytes + activations
    return Cost("verify", seconds, memory, 50 << 20, "give --limit, or --height and --width of smaller images")


def _piece_bytes(part: PartWork) -> int:
    """Memory of the weights of a part's largest piece: as float32 and as they are stored.

    A graph that is small enough to be one piece stays open, so its weights are in memory as float32 twice.
    """
    size = 4 * part.parameters
    return 2 * size if size <= PIECE_BYTES else PIECE_BYTES + PIECE_BYTES * _ITEM[part.precision] // 4


def build_cost(parts: Mapping[str, PartWork], targets: int, machine: Machine) -> Cost:
    """Estimate an engine build: one engine per part and target, one after the other. The builder holds graph, weights
    and engine in memory at once.
    """
    sizes = [p.weight_bytes for p in parts.values()]
    written = targets * sum(sizes)
    seconds = _start(machine, targets * sum(map(builder_seconds, sizes))) + sum(sizes) / machine.hash
    seconds += written / machine.write
    smaller = "build on a machine with more memory: an engine is built once, the card needs no more than the engine"
    return Cost("build", seconds, builder_bytes(max(sizes)), written, smaller)


_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def _start(machine: Machine, seconds: float) -> float:
    """Scale `seconds` of plain Python work to this machine."""
    return seconds * _STEPS / machine.steps
