"""Run one bundle's stages on the CPU for the drift gate, one part in memory at a time.

Prompts -> text states, modulation, latents and heads at every step, images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.emulate.blocks import EmulatedBackend
from arcflow_export.emulate.emulate import widened
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.engines.parts import Parts, RunAll
from arcflow_runtime.generate.condition import Conditioner, conditioner_inputs
from arcflow_runtime.generate.encode import encode_prompts
from arcflow_runtime.generate.text import PromptTokenizer, Tokens
from arcflow_runtime.maths.euler import euler, guide
from arcflow_runtime.maths.noise import draw_latents
from arcflow_runtime.maths.rotary import image_rotary, text_rotary
from arcflow_runtime.maths.schedule import conditioning_guidance, conditioning_timesteps, sigmas
from arcflow_runtime.maths.update import update

#: The backbone's outputs: the three heads of a momentum student, or the velocity of a straight one.
HEADS = ("means", "logweights", "loggammas", "velocity")
#: Image tokens that run together: several images of shapes, or one image of 1024 px.
_BATCH_TOKENS = 1024
Heads = dict[str, np.ndarray]


@dataclass(frozen=True)
class NegativeText:
    """The negative prompt of all cases: text states [1, T, Dt], rotary table, and the scale of the guidance."""

    states: np.ndarray
    text_rotary: np.ndarray
    scale: float


@dataclass(frozen=True)
class CaseBatch:
    """Cases with the same text length: their indices, text states [b, T, Dt], modulation [S, b, M], rotary tables, and
    what they are guided away from.
    """

    rows: list[int]
    states: np.ndarray
    modulation: np.ndarray
    image_rotary: np.ndarray
    text_rotary: np.ndarray
    negative: NegativeText | None = None

    def inputs(self, step: int, latents: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The inputs of the backbone's calls at a step, for the latents [b, N, C] of these cases: for the prompts, and
        for the negative prompt if there is one.
        """
        common = {"latents": latents, "modulation": self.modulation[step], "image_rotary": self.image_rotary}
        texts = [(self.states, self.text_rotary)]
        if self.negative is not None:
            texts.append((self.negative.states.repeat(len(latents), 0), self.negative.text_rotary))
        return [common | {"encoder_hidden_states": states, "text_rotary": rotary} for states, rotary in texts]


@dataclass(frozen=True)
class Trajectory:
    """A run of n cases: latents [n, N, C] float32 before the first step and after every step (S + 1 arrays), and the
    heads [n, N, ...] by name at every step.
    """

    latents: list[np.ndarray]
    heads: list[Heads]


@dataclass(frozen=True)
class EncodedCases:
    """The encoded prompts of the cases: tokens and embeddings by prompt."""

    tokens: Mapping[str, Tokens]
    embeddings: Mapping[str, Embeddings]

    @property
    def pooled(self) -> np.ndarray | None:
        """Pooled vectors of the U distinct prompts [U, Dp], or None if the family has none."""
        found = [e.pooled for e in self.embeddings.values() if e.pooled is not None]
        return np.concatenate(found) if found else None


class BundleStages:
    """Runs the stages of a bundle on the CPU for a set of cases; bfloat16 is emulated."""

    def __init__(
        self, bundle: Bundle, cases: Sequence[DriftCase], scene: ImageSettings, reference_dtype: DType
    ) -> None:
        """Prepare the run; loads no weights.

        Args:
            bundle: an opened bundle.
            cases: prompts and seeds to generate.
            scene: image size, steps, guidance and text length for all cases.
            reference_dtype: the dtype that the conditioning is rounded to, instead of the bundle's own.
        """
        self.bundle = bundle
        self.cases, self.scene = cases, scene
        self.manifest = dataclasses.replace(bundle.manifest, reference_dtype=reference_dtype)
        self._parts = Parts(widened(bundle), EmulatedBackend(), "low")
        token_px = self.manifest.latents.patch_size * self.manifest.latents.vae_scale_factor
        self.grid = (scene.height_px // token_px, scene.width_px // token_px)
        tokens = self.grid[0] * self.grid[1]
        self.sigmas = sigmas(scene.num_inference_steps, self.manifest.schedule, tokens)

    def encode(self) -> EncodedCases:
        """Encode the distinct prompts, and the negative prompt if there is one."""
        tokenizer = PromptTokenizer(self.bundle)
        negative = self.scene.negative_prompt
        prompts = dict.fromkeys([*(case.prompt for case in self.cases), *([] if negative is None else [negative])])
        tokens = {p: tokenizer.tokenize(p, self.scene.max_sequence_length) for p in prompts}
        return EncodedCases(tokens, encode_prompts(self._parts, self.manifest, tokens))

    def modulation(self, pooled: np.ndarray | None) -> np.ndarray:
        """Modulation [S, U, M] for the distinct prompts' pooled vectors, or [S, 1, M] if it does not depend on them."""
        return np.asarray(Conditioner(self.bundle).modulation(self._parts, *self._conditioning(), pooled), np.float32)

    def conditioner_inputs(self, pooled: np.ndarray | None) -> dict[str, np.ndarray]:
        """The conditioner's inputs for the distinct prompts' pooled vectors."""
        return conditioner_inputs(*self._conditioning(), pooled)

    def _conditioning(self) -> tuple[np.ndarray, np.float32 | None]:
        """Timesteps [S] float32 and guidance, as the conditioner takes them."""
        m = self.manifest
        timesteps = conditioning_timesteps(self.sigmas, m.family, m.reference_dtype, m.sampler)
        guidance = None
        if m.guidance and self.scene.guidance_scale is not None:
            guidance = conditioning_guidance(self.scene.guidance_scale, m.reference_dtype)
        return timesteps, guidance

    def noise(self) -> np.ndarray:
        """Noise [n, N, C] float32, from the seed of each case."""
        k = self.manifest.latents
        seeds = [case.seed for case in self.cases]
        h, w = (side * k.patch_size for side in self.grid)
        return draw_latents(seeds, len(seeds), k.channels, h, w, k.patch_size)

    def batches(self, text: EncodedCases, modulation: np.ndarray) -> list[CaseBatch]:
        """Group the cases by text length into batches."""
        m = self.manifest
        place = {p: i for i, p in enumerate(text.embeddings)}
        by_length: dict[int, list[int]] = {}
        for i, case in enumerate(self.cases):
            by_length.setdefault(text.embeddings[case.prompt].states.shape[1], []).append(i)
        negative, found = self._negative(text), []
        for length, rows in by_length.items():
            for chunk in _chunks(rows, self._size()):
                prompts = [self.cases[i].prompt for i in chunk]
                where = [place[p] for p in prompts] if modulation.shape[1] > 1 else [0] * len(chunk)
                found.append(
                    CaseBatch(
                        chunk,
                        np.concatenate([text.embeddings[p].states for p in prompts]),
                        modulation[:, where],
                        image_rotary(m.rotary, m.family, m.rotary_dtype, *self.grid),
                        text_rotary(m.rotary, m.family, m.rotary_dtype, *self.grid, length),
                        negative,
                    )
                )
        return found

    def _negative(self, text: EncodedCases) -> NegativeText | None:
        m, prompt = self.manifest, self.scene.negative_prompt
        if prompt is None:
            return None
        states = text.embeddings[prompt].states
        rotary = text_rotary(m.rotary, m.family, m.rotary_dtype, *self.grid, states.shape[1])
        return NegativeText(states, rotary, self.scene.true_cfg_scale)

    def generate(self, batches: list[CaseBatch], progress: Callable[[], None] = lambda: None) -> Trajectory:
        """Run all steps from noise; `progress` is called after each batch of each step."""
        with self.use_backbone() as run_all:
            return walk(run_all, batches, self.noise(), self.sigmas, progress)

    def use_backbone(self) -> AbstractContextManager[RunAll]:
        """A context manager that gives a function to run the bundle's backbone."""
        return self._parts.use_all("backbone")

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents [n, N, C] to images [n, H, W, 3] uint8."""
        chunks = _chunks(list(range(len(latents))), self._size())
        grids = [{"latents": latents[chunk].reshape(len(chunk), *self.grid, -1)} for chunk in chunks]
        with self._parts.use_all("vae_decoder") as run_all:
            return np.concatenate([outputs["images"] for outputs in run_all(grids)])

    def _size(self) -> int:
        return max(min(_BATCH_TOKENS // (self.grid[0] * self.grid[1]), self.manifest.ranges.batch.max), 1)


def walk(
    run_all: RunAll,
    batches: list[CaseBatch],
    noise: np.ndarray,
    sigmas: np.ndarray,
    progress: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Run all steps from `noise` [n, N, C], with one backbone run per batch and step."""
    latents, heads = [noise], []
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        (found,) = predict(run_all, step, [(batches, latents[-1])], progress)
        heads.append(found)
        latents.append(advance(latents[-1], found, float(sigma), float(sigma_next)))
    return Trajectory(latents, heads)


def predict(
    run_all: RunAll,
    step: int,
    asked: Sequence[tuple[list[CaseBatch], np.ndarray]],
    progress: Callable[[], None] = lambda: None,
) -> list[Heads]:
    """Compute the float32 heads of all cases at one step, for each of several sets of batches and latents [n, N, C].

    With a negative prompt, the velocity is the guided one. All sets run together, so that a backbone that does not fit
    in memory is read only once.
    """
    inputs = [x for batches, latents in asked for batch in batches for x in batch.inputs(step, latents[batch.rows])]
    outputs = iter(run_all(inputs))
    found = []
    for batches, _ in asked:
        parts = []
        for batch in batches:
            given = next(outputs)
            heads = {name: given[name].astype(np.float32, copy=False) for name in HEADS if name in given}
            if batch.negative is not None:
                away = next(outputs)["velocity"].astype(np.float32, copy=False)
                heads = {"velocity": guide(heads["velocity"], away, batch.negative.scale)}
            parts.append((batch.rows, heads))
            progress()
        found.append(_gathered(parts))
    return found


def advance(latents: np.ndarray, heads: Heads, sigma: float, sigma_next: float) -> np.ndarray:
    """Do one step; infinities are kept, because they count as drift."""
    if "velocity" in heads:
        return euler(latents, heads["velocity"], sigma - sigma_next)
    with np.errstate(all="ignore"):
        return update(latents, heads["means"], heads["logweights"], heads["loggammas"], sigma, sigma, sigma_next)


def backbone_inputs(batches: list[CaseBatch], trajectory: Trajectory, step: int) -> Iterator[dict[str, np.ndarray]]:
    """The inputs of the backbone's calls at a step of a trajectory, batch by batch."""
    for batch in batches:
        yield from batch.inputs(step, trajectory.latents[step][batch.rows])


def _gathered(parts: list[tuple[list[int], Heads]]) -> Heads:
    """Join the heads of several batches, in the order of the cases."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return {name: np.concatenate([heads[name] for _, heads in parts])[order] for name in parts[0][1]}


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
