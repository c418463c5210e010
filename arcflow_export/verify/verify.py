"""Compare a bundle with the torch student that it came from: errors of each part and end to end, with derived bounds.

A float32 part must agree with torch's float32 numbers. For a part in reduced precision, the bound is the distance of
torch in the same precision from torch in float32, on the same inputs. That distance is random, because it comes from
many rounding errors; it depends on few of them where a sensitive place (a softmax between two modes) magnifies them.
Between two prompts of the shapes student it varies fivefold, and the bundle's distance over torch's varies between 0.5
and 2.6. So torch runs `RUNS` times with its latents rounded up or down at random, and the bound is what one more such
run may reach:

    bound = SPREADS * sqrt(m + 3 s sqrt(1 + 1/RUNS)),  m and s: mean and standard deviation of the squared distances

The distances are squared because the squares of independent errors add. Text encoders have no latents to round, so they
run once and s is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from arcflow_export.emulate.blocks import EmulatedBackend
from arcflow_export.emulate.emulate import widened
from arcflow_export.student.load import Student
from arcflow_export.student.reference import TorchStudent
from arcflow_export.verify.overflow import OverflowCheck, Reach
from arcflow_runtime.backends import open_for
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.disk.signatures import encoder_of
from arcflow_runtime.engines.base import Backend, Engine
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import EngineError
from arcflow_runtime.generate.condition import Conditioner
from arcflow_runtime.generate.encode import encode_prompts
from arcflow_runtime.generate.pipeline import Pipeline
from arcflow_runtime.generate.text import PromptTokenizer
from arcflow_runtime.maths.dtypes import to_float32
from arcflow_runtime.maths.rotary import image_rotary, text_rotary
from arcflow_runtime.maths.schedule import conditioning_guidance, conditioning_timesteps, sigmas

#: Bound for float32 parts, the same as for the golden cases: they differ from torch only in the order of float32 sums.
FLOAT32_BOUND = 1e-4
#: A graph in reduced precision may be this many times as far from float32 as torch is. It rounds after every operator,
#: torch only once per kernel (for example a linear with its bias, or a whole group norm). Measured on the shapes
#: student: 1.05 times for the heads, 1.5 times for the VAE.
SPREADS = 2.0
#: Number of runs of torch in the reduced precision. The first rounds the latents to nearest, the others at random, so
#: that their spread shows how much rounding matters.
RUNS = 4
#: Row for a bundle with another VAE than the base's. It has no bound: how much an image may change is a choice.
FULL_VAE = "vae image, against the base's VAE"
#: Bound for images, 1.5 grey levels: an image has 8 bits, so smaller differences are rounding.
IMAGE_BOUND = 1.5 / 255


@dataclass(frozen=True)
class VerifyCase:
    """One request to compare on; `negative_prompt` guides a straight student with `true_cfg_scale`, above 1."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    seed: int = 42
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0


@dataclass(frozen=True)
class VerifyRow:
    """One comparison: the relative RMS error against torch in float32, and its bound.

    For a part in float16 there is also a row for overflow. There, `error` is the largest value divided by 65504, `node`
    is the first node that overflows (or the one with the largest value), and `layers` are linears to keep in float32.
    """

    case: int
    what: str
    error: float
    bound: float
    node: str | None = None
    layers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if the error is within its bound; False for NaN."""
        return self.error <= self.bound


def verify_bundle(
    bundle: Bundle,
    student: Student,
    cases: list[VerifyCase],
    progress: Callable[[str], None] = lambda _: None,
    backend: str | None = None,
) -> list[VerifyRow]:
    """Compare a bundle with the student in torch: text states, heads at every step, VAE, and whole images.

    With a negative prompt, its text states and the velocity that they give are compared too.

    Without `backend`, parts in bfloat16 and float16 are emulated on the CPU, and parts in float16 are also checked for
    overflow.

    Args:
        bundle: an opened bundle.
        student: the same base, adapter and LoRAs.
        cases: the requests to compare on.
        progress: called with the name of each stage as it begins.
        backend: run the parts with this backend's engines, a key of `backends.BACKENDS` or "auto".

    Returns:
        One row per case and quantity.

    Raises:
        EngineError: the backend cannot run the bundle here, or an engine failed.
    """
    m = bundle.manifest
    checked = _CheckedBackend()
    engines: Backend = checked if backend is None else open_for(bundle, backend)
    shown = widened(bundle) if backend is None else bundle
    progress("loading the torch student")
    reference = getattr(torch, m.reference_dtype)
    shift, ratio = m.schedule.shift, m.schedule.timestep_ratio
    straight = m.schedule if m.sampler == "linear" else None
    exact = TorchStudent(student, torch.float32, reference, shift=shift, timestep_ratio=ratio, straight=straight)
    same = exact
    if any(part.precision != "float32" for part in m.parts.values()):
        same = TorchStudent(
            student,
            _dtypes(bundle),
            reference,
            float32_layers=_float32_layers(bundle),
            shift=shift,
            timestep_ratio=ratio,
            straight=straight,
        )
    rows: list[VerifyRow] = []
    with Pipeline(shown, EmulatedBackend() if backend is None else engines) as pipe:
        parts = Parts(shown, engines, "resident")
        for i, case in enumerate(cases):
            progress(f"case {i}: {case.prompt[:40]!r} {case.width}x{case.height}, {case.num_inference_steps} steps")
            compare = _Comparison(i, rows)
            _compare_parts(shown, parts, exact, same, case, compare)
            try:
                _compare_images(pipe, exact, same, case, compare)
            except EngineError:  # the pipeline refuses NaN, which an overflow causes
                if all(reach.share <= 1 for reach in checked.furthest.values()):
                    raise
                rows.append(VerifyRow(i, "end to end: image", math.nan, IMAGE_BOUND))
            rows += [
                VerifyRow(i, f"{part}: reach into float16", r.share, 1.0, r.node, r.layers)
                for part, r in checked.furthest.items()
            ]
            checked.furthest.clear()
        parts.close()
    return rows


def _dtypes(bundle: Bundle) -> dict[str, torch.dtype]:
    """The dtype of every part; a conditioner that was baked and not shipped gets the backbone's."""
    found = {name: getattr(torch, part.precision) for name, part in bundle.manifest.parts.items()}
    return {"conditioner": found["backbone"]} | found


def _float32_layers(bundle: Bundle) -> dict[str, list[str]]:
    """By part of reduced precision, the linears whose weights are in float32."""
    kept = {}
    for name, part in bundle.manifest.parts.items():
        if part.precision != "float32":
            graph = ir.load(bundle.path(part.graph)).graph
            weights = {v.name: v.dtype for v in graph.initializers.values()}
            layers = [n.name for n in graph if n.op_type == "MatMul" and n.name and f"{n.name}.weight" in weights]
            kept[name] = [layer for layer in layers if weights[f"{layer}.weight"] == ir.DataType.FLOAT]
    return kept


class _CheckedBackend(EmulatedBackend):
    """Emulates parts, and checks float16 parts for overflow on the same inputs; `furthest` has the worst by part."""

    def __init__(self) -> None:
        self.furthest: dict[str, Reach] = {}

    def open(self, bundle: Bundle, part: str) -> Engine:
        engine = super().open(bundle, part)
        if bundle.manifest.parts[part].precision != "float16":
            return engine
        return _CheckedEngine(engine, OverflowCheck(bundle, part), part, self.furthest)


class _CheckedEngine:
    """An engine whose inputs are also given to an `OverflowCheck`."""

    def __init__(self, engine: Engine, check: OverflowCheck, part: str, furthest: dict[str, Reach]):
        self._engine, self._check, self._part, self._furthest = engine, check, part, furthest

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        reach = self._check.run(inputs)
        known = self._furthest.get(self._part)
        self._furthest[self._part] = reach if known is None else known.joined(reach)
        return self._engine.run(inputs)

    def close(self) -> None:
        self._engine.close()


class _Comparison:
    """Adds rows of comparisons, each with the bound for the precision of the compared part."""

    def __init__(self, case: int, rows: list[VerifyRow]):
        self.case, self.rows = case, rows

    def add(
        self, what: str, got: np.ndarray, runs: list[torch.Tensor], exact: torch.Tensor, floor: float = FLOAT32_BOUND
    ) -> None:
        """Compare `got` with torch in float32 (`exact`); `runs` are torch's results in the part's reduced precision."""
        reference = exact.float().numpy()
        bound = _bound([_relative(run.float().numpy(), reference) for run in runs]) if runs else 0.0
        # If torch overflows too, the bound is NaN. Then the floor applies, and only float32's accuracy passes.
        self.rows.append(VerifyRow(self.case, what, _relative(got, reference), bound if bound > floor else floor))


def _bound(distances: list[float]) -> float:
    squares = np.square(distances)
    n = len(squares)
    deviation = squares.std(ddof=1) if n > 1 else 0.0
    return float(SPREADS * np.sqrt(squares.mean() + 3 * deviation * np.sqrt(1 + 1 / n)))


def _relative(got: np.ndarray, reference: np.ndarray) -> float:
    difference = np.asarray(got, np.float64) - reference
    if not difference.size:  # a student with one mode has no gammas
        return 0.0
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(np.square(reference, dtype=np.float64))), 1e-30))


def _roundings(bundle: Bundle, *parts: str) -> list[torch.Generator | None]:
    """The rounding of torch's latents in each run: first to nearest (None), then at random; empty for float32 parts."""
    precisions = {bundle.manifest.parts[p].precision for p in parts if p in bundle.manifest.parts}
    if precisions <= {"float32"}:
        return []
    return [None, *(torch.Generator().manual_seed(run) for run in range(1, RUNS))]


def _compare_parts(
    bundle: Bundle, parts: Parts, exact: TorchStudent, same: TorchStudent, case: VerifyCase, compare: _Comparison
) -> None:
    """Compare each part on torch's float32 inputs, so that an error shows in the part that causes it."""
    m = bundle.manifest
    length = m.text.max_sequence_length
    states, pooled = _compare_text(bundle, parts, exact, same, case.prompt, "", compare)
    texts = {"": states}
    if case.negative_prompt is not None:
        texts["negative "], _ = _compare_text(bundle, parts, exact, same, case.negative_prompt, "negative ", compare)

    grid = (case.height // 16, case.width // 16)
    schedule = sigmas(case.num_inference_steps, m.schedule, grid[0] * grid[1])
    guidance = conditioning_guidance(case.guidance_scale, m.reference_dtype) if m.guidance else None
    modulation = Conditioner(bundle).modulation(
        parts,
        conditioning_timesteps(schedule, m.family, m.reference_dtype, m.sampler),
        guidance,
        None if pooled is None else pooled.numpy(),
    )
    torch_run = exact.generate(*_arguments(case, length), **_guidance(case))
    x = torch_run.noise
    roundings = _roundings(bundle, "conditioner", "backbone")
    with parts.use("backbone") as run:
        for step in range(case.num_inference_steps):
            sigma = torch.tensor(schedule[step], dtype=torch.float32)
            for which, text in texts.items():
                heads = run(
                    {
                        "latents": x.numpy(),
                        "encoder_hidden_states": text.numpy(),
                        "modulation": modulation[step],
                        "image_rotary": image_rotary(m.rotary, m.family, m.rotary_dtype, *grid),
                        "text_rotary": text_rotary(m.rotary, m.family, m.rotary_dtype, *grid, text.shape[1]),
                    }
                )
                arguments = (x, sigma, text, pooled, case.height, case.width, case.guidance_scale)
                reference = exact.predict(*arguments)
                rounded = [same.predict(*arguments, rounding) for rounding in roundings]
                for i, name in enumerate(spec.name for spec in m.parts["backbone"].outputs):
                    what = f"step {step} {which}{name}"
                    compare.add(what, to_float32(heads[name]), [r[i] for r in rounded], reference[i])
            x = torch_run.steps[step]
    with parts.use("vae_decoder") as run:
        pixels = run({"latents": x.unflatten(1, grid).numpy()})["images"]
    images = [same.decode(x, case.height, case.width, r) for r in _roundings(bundle, "vae_decoder")]
    exact_image = exact.decode(x, case.height, case.width)
    compare.add("vae image", pixels / np.float32(255), images, exact_image, IMAGE_BOUND)
    if exact.full_vae is not None:
        full = exact.decode(x, case.height, case.width, full=True)
        distance = _relative(pixels / np.float32(255), full.numpy())
        compare.rows.append(VerifyRow(compare.case, FULL_VAE, distance, math.inf))


def _compare_text(
    bundle: Bundle,
    parts: Parts,
    exact: TorchStudent,
    same: TorchStudent,
    text: str,
    which: str,
    compare: _Comparison,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compare the encoders on one text; torch's own states in float32 [1, T, D] and pooled vector [1, Dp]."""
    m = bundle.manifest
    length = m.text.max_sequence_length
    tokens = PromptTokenizer(bundle).tokenize(text, length)
    encoded = encode_prompts(parts, m, {text: tokens})[text]
    states, pooled = exact.encode(text, length)
    rounded_states, rounded_pooled = same.encode(text, length)
    encoder = encoder_of(m.family, "encoder_hidden_states")
    assert encoder is not None
    runs = [rounded_states] if _roundings(bundle, encoder) else []
    compare.add(f"{which}text states", to_float32(encoded.states), runs, states)
    if pooled is not None and rounded_pooled is not None and encoded.pooled is not None:
        runs = [rounded_pooled] if _roundings(bundle, "text_encoder") else []
        compare.add(f"{which}pooled text", to_float32(encoded.pooled), runs, pooled)
    return states, pooled


def _arguments(case: VerifyCase, length: int) -> tuple[str, int, int, int, int, float, int]:
    """The positional arguments of `TorchStudent.generate`."""
    return case.prompt, case.height, case.width, case.num_inference_steps, case.seed, case.guidance_scale, length


def _guidance(case: VerifyCase) -> dict[str, Any]:
    """The arguments of guidance by a negative prompt, for torch and for a pipeline; empty without one."""
    if case.negative_prompt is None:
        return {}
    return {"negative_prompt": case.negative_prompt, "true_cfg_scale": case.true_cfg_scale}


def _compare_images(
    pipe: Pipeline, exact: TorchStudent, same: TorchStudent, case: VerifyCase, compare: _Comparison
) -> None:
    """Compare the whole pipeline, from the same noise."""
    m = pipe.bundle.manifest
    steps: list[np.ndarray] = []
    images = pipe(
        case.prompt,
        case.height,
        case.width,
        case.num_inference_steps,
        case.guidance_scale if m.guidance else None,
        case.seed,
        output_type="numpy",
        callback_on_step_end=lambda _, latents: steps.append(latents.copy()),
        **_guidance(case),
    ).images
    arguments, guidance = _arguments(case, m.text.max_sequence_length), _guidance(case)
    torch_run = exact.generate(*arguments, **guidance)
    every = [same.generate(*arguments, rounding=r, **guidance) for r in _roundings(pipe.bundle, *m.parts)]
    before_vae = bool(_roundings(pipe.bundle, *(m.parts.keys() - {"vae_decoder"})))
    for step, exact_latents in enumerate(torch_run.steps):
        runs = [run.steps[step] for run in every] if before_vae else []
        compare.add(f"end to end: latents after step {step}", steps[step], runs, exact_latents)
    compare.add("end to end: image", np.asarray(images), [run.images for run in every], torch_run.images, IMAGE_BOUND)


def as_dict(row: VerifyRow) -> dict[str, object]:
    """A row as JSON values; NaN and infinities become None."""
    numbers = {
        key: value if math.isfinite(value) else None for key, value in (("error", row.error), ("bound", row.bound))
    }
    return dataclasses.asdict(row) | numbers | {"passed": row.passed}
