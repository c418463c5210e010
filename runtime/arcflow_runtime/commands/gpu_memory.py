"""What a bundle needs of a GPU's memory, for `arcflow inspect --gpu-memory`: bundle and GPU -> a report."""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.engines.modes import MODES, TENSORRT, EngineBytes
from arcflow_runtime.engines.store import check_engine, engine_bytes, read_records
from arcflow_runtime.errors import EngineError
from arcflow_runtime.generate.memory import usual_size
from arcflow_runtime.memory.choice import fitting_mode, gigabytes
from arcflow_runtime.memory.sums import BundleMemory, ImageSize, Sums

#: Sides of square images, and numbers of images at once, that are shown if the bundle allows them.
_SIDES_PX, _BATCHES = (512, 768, 1024, 1536, 2048), (1, 4)


@dataclass(frozen=True)
class Report:
    """The sums of several sizes; `built` are the parts whose engines' real sizes are used."""

    bundle: Bundle
    gpu_bytes: int
    built: tuple[str, ...]
    sums: tuple[Sums, ...]


def report(bundle: Bundle, gpu_bytes: int) -> Report:
    """Make the sums for the sizes that are shown.

    Raises:
        BundleError: a graph cannot be read.
    """
    built = _built(bundle)
    memory = BundleMemory(bundle, TENSORRT, built)
    return Report(bundle, gpu_bytes, tuple(built), tuple(memory.sums(size) for size in _sizes(bundle)))


def as_dict(report: Report) -> dict[str, object]:
    """The report for JSON."""
    return {
        "bytes": report.gpu_bytes,
        "built": list(report.built),
        "images": [
            {
                **vars(sums.size),
                "parts": {name: vars(part) for name, part in sums.parts.items()},
                "modes": {
                    mode: {"peak_bytes": sums.peak(mode), "stages": sums.stages(mode), **vars(sums.plans[mode])}
                    for mode in MODES
                },
                "fits": fitting_mode(sums, report.gpu_bytes),
                "complete": sums.complete,
            }
            for sums in report.sums
        ],
    }


def as_lines(report: Report) -> list[str]:
    """The report as text."""
    first = report.sums[0]
    lines = [
        f"memory on a GPU with {gigabytes(report.gpu_bytes)} GB, texts of {first.size.text_tokens} tokens, "
        f"{first.size.steps} steps; GB"
    ]
    parts = [("part", "weights", *(f"at {_sides(s.size)}" for s in report.sums if s.size.batch == first.size.batch))]
    single = [s for s in report.sums if s.size.batch == first.size.batch]
    for name, part in first.parts.items():
        bounds = (s.parts[name].activations for s in single)
        parts.append((name, gigabytes(part.weights), *("unknown" if a is None else gigabytes(a) for a in bounds)))
    lines += [*_columns(parts), _source(report), ""]
    images = [("image", *MODES, "fits")]
    for sums in report.sums:
        needs = (gigabytes(sums.peak(mode)) for mode in MODES)
        size = f"{_sides(sums.size)}, {sums.size.batch} at once"
        images.append((size, *needs, fitting_mode(sums, report.gpu_bytes) or "no"))
    return [*lines, *_columns(images), *_advice(report)]


def _sizes(bundle: Bundle) -> list[ImageSize]:
    usual, ranges = usual_size(bundle.manifest), bundle.manifest.ranges
    sides = [px for px in _SIDES_PX if _within(px, ranges.height_px) and _within(px, ranges.width_px)]
    batches = [n for n in _BATCHES if _within(n, ranges.batch)] or [usual.batch]
    shapes = [(px, px) for px in sides] or [(usual.height_px, usual.width_px)]
    return [ImageSize(n, *shape, usual.text_tokens, usual.steps) for n in batches for shape in shapes]


def _within(value: int, span: SizeRange) -> bool:
    return span.min <= value <= span.max


def _built(bundle: Bundle) -> dict[str, EngineBytes]:
    """By part, what the largest of its engines takes that would load; damaged ones are shown by `arcflow inspect`."""
    found: dict[str, EngineBytes] = {}
    try:
        records = read_records(bundle)
    except EngineError:
        return found
    for path, record in records:
        part = record.key.part
        if part not in bundle.manifest.parts:
            continue
        try:
            check_engine(path.parent / record.file, record)
        except EngineError:
            continue
        taken = engine_bytes(bundle, record)
        if part not in found or taken.weights > found[part].weights:
            found[part] = taken
    return found


def _source(report: Report) -> str:
    built = ", ".join(report.built)
    sizes = f"sizes of the engines of {built}, otherwise weights files" if report.built else "weights files"
    text = f"weights: {sizes}; activations: a bound from the graphs, which engines with fused kernels do not reach"
    unknown = [name for name, part in report.sums[0].parts.items() if part.activations is None]
    return f"{text}; unknown and not counted: {', '.join(unknown)}" if unknown else text


def _advice(report: Report) -> list[str]:
    """What to do, if not every size fits."""
    fitting = [s for s in report.sums if fitting_mode(s, report.gpu_bytes) is not None]
    if len(fitting) == len(report.sums):
        return []
    if fitting:
        largest = max(fitting, key=lambda s: (s.size.height_px * s.size.width_px, s.size.batch))
        fits = f"{_sides(largest.size)}, {largest.size.batch} at once"
        return [f"the largest that fits is {fits}; build engines for it with arcflow build --resolutions"]
    smallest = min(report.sums, key=lambda s: s.peak("low"))
    stages = smallest.stages("low")
    part = max(stages, key=lambda name: stages[name])
    spec = report.bundle.manifest.parts[part]
    needed, weights = stages[part], smallest.parts[part].weights
    lines = [
        f"nothing fits: {part} alone needs {gigabytes(needed)} GB for {_sides(smallest.size)}, "
        f"{gigabytes(weights)} GB of it weights"
    ]
    if weights < needed / 2:
        return [*lines, "generate smaller images than these"]
    if spec.quantization is None and spec.precision != "float32":
        lines.append("put its linears in FP8, which halves them: arcflow quantize")
    if spec.precision == "float32":
        lines.append("export it in bfloat16, which halves it: arcflow export --dtype bfloat16")
    return [*lines, f"or leave part of its weights in host memory: arcflow build --parts {part} --weight-streaming"]


def _sides(size: ImageSize) -> str:
    return f"{size.height_px} px" if size.height_px == size.width_px else f"{size.height_px} x {size.width_px} px"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join([f"{row[0]:{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
