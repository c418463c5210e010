"""A bundle and the torch student it came from -> errors per part and end to end, each against a derived bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from arcflow_runtime.bundle import Bundle
from arcflow_runtime.condition import Conditioner
from arcflow_runtime.encode import encode_prompts
from arcflow_runtime.parts import Parts
from arcflow_runtime.pipeline import Pipeline
from arcflow_runtime.rotary import image_rotary, text_rotary
from arcflow_runtime.schedule import conditioning_guidance, conditioning_timesteps, sigmas
from arcflow_runtime.text import PromptTokenizer

from .emulate import EmulatedBackend, widened
from .load import Student
from .student import TorchStudent

#: A float32 bundle differs from torch only by the order of float32 sums; the golden cases' bound.
FLOAT32_BOUND = 1e-4
#: Two implementations in the same reduced precision round independently. Each is about one spread (its distance to
#: float32) from the exact result, so they are about sqrt(2) spreads apart; 2 leaves room for the estimate itself.
SPREADS = 2.0
#: An image has 8 bits: a spread below one grey level cannot be seen.
IMAGE_BOUND = 1.5 / 255


@dataclass(frozen=True)
class Case:
    """One request to compare on."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    seed: int = 42
    guidance_scale: float = 3.5


@dataclass(frozen=True)
class Row:
    """One comparison: RMS of the difference over RMS of the reference, and the largest it may be."""

    case: int
    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within its bound."""
        return self.error <= self.bound


def verify_bundle(
    bundle: Bundle, student: Student, cases: list[Case], progress: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Compare a bundle with the student in torch: text states, heads at every step, VAE, and whole pictures.

    A float32 bundle is held to 1e-4. One in reduced precision is held to twice torch's own spread between that
    precision and float32. bfloat16 parts are emulated on the CPU.

    Args:
        bundle: an opened bundle.
        student: the same base, adapter and LoRAs.
        cases: what to draw.
        progress: told of each stage.

    Returns:
        One row per case and quantity.
    """
    progress("loading the torch student")
    dtype = getattr(torch, bundle.manifest.dtype)
    reference = getattr(torch, bundle.manifest.reference_dtype)
    exact = TorchStudent(student, torch.float32, reference)
    same = exact if dtype == torch.float32 else TorchStudent(student, dtype, reference)
    shown = widened(bundle)
    rows: list[Row] = []
    with Pipeline(shown, EmulatedBackend()) as pipe:
        parts = Parts(shown, EmulatedBackend(), keep=True)
        for i, case in enumerate(cases):
            progress(f"case {i}: {case.prompt[:40]!r} {case.width}x{case.height}, {case.num_inference_steps} steps")
            compare = _Comparison(i, same is exact, rows)
            _compare_parts(shown, parts, exact, same, case, compare)
            _compare_pictures(pipe, exact, same, case, compare)
        parts.close()
    return rows


class _Comparison:
    """Adds rows, each with the bound that its kind of bundle allows."""

    def __init__(self, case: int, float32: bool, rows: list[Row]):
        self.case, self.float32, self.rows = case, float32, rows

    def add(self, what: str, got: np.ndarray, same: torch.Tensor, exact: torch.Tensor, floor: float = 0.0) -> None:
        reference = same.float().numpy()
        bound = FLOAT32_BOUND if self.float32 else SPREADS * _relative(reference, exact.float().numpy())
        self.rows.append(Row(self.case, what, _relative(got, reference), max(bound, floor)))


def _relative(got: np.ndarray, reference: np.ndarray) -> float:
    difference = np.asarray(got, np.float64) - reference
    if not difference.size:  # the gammas of a student of one mode
        return 0.0
    return float(np.sqrt(np.mean(difference**2)) / max(np.sqrt(np.mean(np.square(reference, dtype=np.float64))), 1e-30))


def _compare_parts(
    bundle: Bundle, parts: Parts, exact: TorchStudent, same: TorchStudent, case: Case, compare: _Comparison
) -> None:
    """Each part on torch's own inputs, so that an error shows in the part that makes it."""
    m = bundle.manifest
    length = m.text.max_sequence_length
    tokens = PromptTokenizer(bundle).tokenize(case.prompt, length)
    encoded = encode_prompts(parts, m, {case.prompt: tokens})[case.prompt]
    states, pooled = same.encode(case.prompt, length)
    states32, pooled32 = exact.encode(case.prompt, length)
    compare.add("text states", encoded.states, states, states32)
    if pooled is not None and pooled32 is not None and encoded.pooled is not None:
        compare.add("pooled text", encoded.pooled, pooled, pooled32)

    grid = (case.height // 16, case.width // 16)
    schedule = sigmas(case.num_inference_steps, m.schedule)
    guidance = conditioning_guidance(case.guidance_scale, m.reference_dtype) if m.guidance else None
    modulation = Conditioner(bundle).modulation(
        parts,
        conditioning_timesteps(schedule, m.family, m.reference_dtype),
        guidance,
        None if pooled is None else pooled.float().numpy(),
    )
    drawn = same.draw(
        case.prompt, case.height, case.width, case.num_inference_steps, case.seed, case.guidance_scale, length
    )
    x = drawn.noise
    with parts.use("backbone") as run:
        for step in range(case.num_inference_steps):
            heads = run(
                {
                    "latents": x.numpy(),
                    "encoder_hidden_states": states.float().numpy(),
                    "modulation": modulation[step],
                    "image_rotary": image_rotary(m.rotary, m.family, m.reference_dtype, *grid),
                    "text_rotary": text_rotary(m.rotary, m.family, m.reference_dtype, *grid, states.shape[1]),
                }
            )
            sigma = torch.tensor(schedule[step], dtype=torch.float32)
            size = (case.height, case.width, case.guidance_scale)
            reference = same.predict(x, sigma, states, pooled, *size)
            reference32 = exact.predict(x, sigma, states.float(), None if pooled is None else pooled.float(), *size)
            for name, a, b in zip(("means", "logweights", "loggammas"), reference, reference32, strict=True):
                compare.add(f"step {step} {name}", heads[name], a, b)
            x = drawn.steps[step]
    with parts.use("vae_decoder") as run:
        pixels = run({"latents": x.unflatten(1, grid).numpy()})["images"]
    decoded, decoded32 = (s.decode(x, case.height, case.width) for s in (same, exact))
    compare.add("vae image", pixels / np.float32(255), decoded, decoded32, IMAGE_BOUND)


def _compare_pictures(
    pipe: Pipeline, exact: TorchStudent, same: TorchStudent, case: Case, compare: _Comparison
) -> None:
    """The whole pipeline from the same noise."""
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
    ).images
    arguments = (
        case.prompt,
        case.height,
        case.width,
        case.num_inference_steps,
        case.seed,
        case.guidance_scale,
        m.text.max_sequence_length,
    )
    drawn = same.draw(*arguments)
    drawn32 = drawn if same is exact else exact.draw(*arguments)
    for step, (a, b) in enumerate(zip(drawn.steps, drawn32.steps, strict=True)):
        compare.add(f"end to end: latents after step {step}", steps[step], a, b)
    compare.add("end to end: image", np.asarray(images), drawn.images, drawn32.images, IMAGE_BOUND)


def as_dict(row: Row) -> dict[str, object]:
    """A row for JSON."""
    return dataclasses.asdict(row) | {"passed": row.passed}
