"""Samplers for students that also record their network calls: an adapter in torch, or a bundle in the runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from arcflow_distill.evaluate.options import FAMILY, STUDENT_STEPS
from arcflow_distill.evaluate.samplers import BATCH, Generated, Sampler, noise, to_uint8
from arcflow_export.checkpoint.sources import Location
from arcflow_export.errors import SourceError
from arcflow_export.images.scenes import MAX_SEQUENCE_LENGTH, RESOLUTION
from arcflow_export.student.load import load_student
from arcflow_export.student.reference import TorchStudent
from arcflow_runtime.backends import DEFAULT_BACKEND, open_backend
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.disk.manifest import MANIFEST
from arcflow_runtime.engines.base import Backend, Engine
from arcflow_runtime.generate.pipeline import Pipeline
from arcflow_runtime.maths.schedule import sigmas

_HEADS = ("latents", "means", "logweights", "loggammas")


@dataclass(frozen=True)
class Call:
    """One network call of a student: its input latents, its heads, and the sigmas of the step.

    Packed latents [B, N, C]. Heads as in `arcflow_runtime.maths.update.update`: means [B, N, K, C], logweights
    [B, N, K, P], loggammas [B, N, K-1, P].
    """

    latents: np.ndarray
    means: np.ndarray
    logweights: np.ndarray
    loggammas: np.ndarray
    sigma: float
    sigma_next: float


class StudentSampler(Sampler, Protocol):
    """A student's sampler, which can also return its network calls."""

    def calls(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Call]:
        """The network calls made to generate one image per caption."""
        ...


class AdapterSampler:
    """Samples an adapter in torch, in float32."""

    def __init__(self, base: Path, adapter: Path) -> None:
        """Load the student.

        Raises:
            SourceError: the adapter is missing, damaged or does not fit the base.
        """
        if not (adapter / "config.json").is_file():
            raise SourceError(f"adapter: {adapter} has no config.json; give the directory of an adapter")
        student = load_student(Location(str(base), offline=True), Location(str(adapter), offline=True), [])
        self.student = TorchStudent(student)
        self.network_calls, self.batch = STUDENT_STEPS, BATCH

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Generated:
        """Generate one image per caption."""
        x, _ = self._run(captions, seeds)
        return Generated(x.numpy(), to_uint8(self.student.decode(x, RESOLUTION, RESOLUTION).numpy()))

    def calls(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Call]:
        """The network calls made to generate one image per caption."""
        return self._run(captions, seeds)[1]

    def _run(self, captions: Sequence[str], seeds: Sequence[int]) -> tuple[torch.Tensor, list[Call]]:
        encoded = [self.student.encode(c, MAX_SEQUENCE_LENGTH) for c in captions]
        states = torch.cat([s for s, _ in encoded])
        pooled = torch.cat([p for _, p in encoded if p is not None])
        x, calls = noise(seeds), []
        for sigma, sigma_next in pairwise(self.student.schedule(STUDENT_STEPS, RESOLUTION, RESOLUTION)):
            heads = self.student.predict(x, sigma, states, pooled, RESOLUTION, RESOLUTION, DEFAULT_GUIDANCE_SCALE)
            means, logweights, loggammas = (h.numpy() for h in heads)
            calls.append(Call(x.numpy(), means, logweights, loggammas, float(sigma), float(sigma_next)))
            x = self.student.step(x, heads, float(sigma), float(sigma_next))
        return x, calls


class BundleSampler:
    """Samples a bundle with the runtime."""

    def __init__(self, bundle: Path) -> None:
        """Open the bundle.

        Raises:
            BundleError: the bundle is missing or damaged.
            EngineError: the bundle cannot be run.
            SourceError: the bundle is not of the FLUX family.
        """
        opened = Bundle.open(bundle)
        if opened.manifest.family != FAMILY:
            raise SourceError(f"{bundle} must be a {FAMILY} bundle, got {opened.manifest.family}")
        self._recorder = _Recorder(open_backend(DEFAULT_BACKEND))
        self._pipeline = Pipeline(opened, self._recorder)
        self.network_calls, self.batch = STUDENT_STEPS, min(BATCH, opened.manifest.ranges.batch.max)

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Generated:
        """Generate one image per caption."""
        steps: list[np.ndarray] = []
        out = self._pipeline(
            list(captions),
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=STUDENT_STEPS,
            seed=list(seeds),
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="numpy",
            callback_on_step_end=lambda _, latents: steps.append(latents),
        )
        return Generated(steps[-1], to_uint8(np.asarray(out.images)))

    def calls(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Call]:
        """The network calls made to generate one image per caption."""
        with self._recorder.recording() as recorded:
            for i in range(0, len(captions), self.batch):
                self.generate(captions[i : i + self.batch], seeds[i : i + self.batch])
        schedule = sigmas(STUDENT_STEPS, self._pipeline.bundle.manifest.schedule)
        calls = []
        for step in range(STUDENT_STEPS):
            batches = recorded[step::STUDENT_STEPS]  # all prompts of a batch have one text length and run together
            arrays = [np.concatenate([b[name] for b in batches]).astype(np.float32) for name in _HEADS]
            calls.append(Call(arrays[0], arrays[1], arrays[2], arrays[3], schedule[step], schedule[step + 1]))
        return calls


class _Recorder:
    """A backend that can record the inputs and outputs of the backbone."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._recorded: list[dict[str, np.ndarray]] | None = None

    def check(self, bundle: Bundle) -> None:
        self._inner.check(bundle)

    def open(self, bundle: Bundle, part: str) -> Engine:
        engine = self._inner.open(bundle, part)
        return _Recorded(engine, self._keep) if part == "backbone" else engine

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[dict[str, np.ndarray]]]:
        """Record every run of the backbone until the block ends."""
        recorded: list[dict[str, np.ndarray]] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def _keep(self, arrays: dict[str, np.ndarray]) -> None:
        if self._recorded is not None:
            self._recorded.append({name: arrays[name] for name in _HEADS})


class _Recorded:
    def __init__(self, inner: Engine, keep: Callable[[dict[str, np.ndarray]], None]) -> None:
        self._inner, self._keep = inner, keep

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._inner.run(inputs)
        self._keep({**inputs, **outputs})
        return outputs

    def close(self) -> None:
        self._inner.close()


def open_target(target: Path, base: Path) -> StudentSampler:
    """Open the student in a directory: a bundle (with manifest.json) or an adapter (with config.json).

    Raises:
        ArcFlowError: the directory is neither, is damaged, or does not fit the base.
    """
    if (target / MANIFEST).is_file():
        return BundleSampler(target)
    if (target / "config.json").is_file():
        return AdapterSampler(base, target)
    raise SourceError(
        f"target: {target} must be a bundle (with {MANIFEST}) or an adapter (with config.json); check the path"
    )
