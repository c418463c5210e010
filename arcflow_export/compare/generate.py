"""Generate the same cases with several bundles and step counts: subjects, cases -> images, latents, times, memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from arcflow_export.drift.cases import DriftCase
from arcflow_runtime import ArcFlowError, Pipeline, PipelineOutput
from arcflow_runtime.backends import ON_CPU
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.generate.guidance import check_guidance

#: The stages of the table -> the pipeline's stages that they sum. What is in none of them is "other".
STAGES: Mapping[str, tuple[str, ...]] = {
    "text": ("tokenize", "encode"),
    "condition": ("condition",),
    "network": ("backbone",),
    "decode": ("decode",),
}
OTHER = "other"
#: Images of each subject whose times are left out of the medians.
_WARM_UP = 2


@dataclass(frozen=True)
class Subject:
    """A bundle and a number of steps, and its name in the table."""

    name: str
    root: Path
    steps: int


@dataclass(frozen=True)
class Request:
    """The settings of all images."""

    height_px: int | None
    width_px: int | None
    guidance_scale: float | None
    negative_prompt: str | None
    true_cfg_scale: float | None
    backend: str
    threads: int | None


@dataclass(frozen=True)
class Generated:
    """One subject's results for n cases.

    `calls`: network calls an image. `seconds` [n]: time of each image. `total_s` and `stages_s`: medians of an image's
    time and of its stages, without the first images, which do one-time work. `peak_bytes`: the peak of resident memory
    of a process that ran this bundle alone, with all of its step counts; None if the system does not say. `latents` [n,
    N, C] float32; `images` [n, H, W, 3] uint8. `warnings`: the pipeline's, each once.
    """

    subject: Subject
    calls: int
    seconds: tuple[float, ...]
    total_s: float
    stages_s: Mapping[str, float]
    peak_bytes: int | None
    latents: np.ndarray
    images: np.ndarray
    warnings: tuple[str, ...]


def parse_subjects(texts: Sequence[str]) -> tuple[Subject, ...]:
    """Parse BUNDLE or BUNDLE@STEPS; without STEPS it is the bundle's own number.

    Raises:
        BundleError: a bundle cannot be opened.
    """
    subjects = []
    for text in texts:
        match = re.fullmatch(r"(.+)@(\d+)", text)
        path, steps = (Path(match[1]), int(match[2])) if match else (Path(text), None)
        own = Bundle.open(path).manifest.schedule.num_inference_steps
        count = own if steps is None else steps
        subjects.append(Subject(f"{path.absolute().name}, {count} step{'s' if count > 1 else ''}", path, count))
    return tuple(subjects)


def generate(
    subjects: Sequence[Subject], cases: Sequence[DriftCase], request: Request, progress: Callable[[str], None]
) -> list[Generated]:
    """Generate every case with every subject, in the subjects' order. Bundles run one after the other.

    Args:
        subjects: what to compare.
        cases: prompts and seeds.
        request: the settings of all images.
        progress: called after each image with the subject's name.

    Raises:
        RequestError: a bundle does not take these settings.
        EngineError: a backend cannot run a bundle here, or an engine failed.
    """
    found: dict[Subject, Generated] = {}
    for root in dict.fromkeys(subject.root for subject in subjects):
        mine = [subject for subject in dict.fromkeys(subjects) if subject.root == root]
        outputs: dict[Subject, list[_Image]] = {subject: [] for subject in mine}
        # A process of its own, so that the peak of its memory is this bundle's.
        with ProcessPoolExecutor(1, get_context("spawn"), _load, (root, request)) as process:
            for case in cases:
                for subject in mine:
                    outputs[subject].append(process.submit(_generate, subject.steps, case, request).result())
                    progress(subject.name)
            peak = process.submit(_peak_bytes).result()
        manifest = Bundle.open(root).manifest
        for subject, images in outputs.items():
            found[subject] = _joined(subject, images, peak, _calls(manifest, subject, request))
    return [found[subject] for subject in subjects]


@dataclass(frozen=True)
class _Image:
    """One image [H, W, 3] uint8, its latents [N, C], the times of the stages, and the pipeline's warnings."""

    image: np.ndarray
    latents: np.ndarray
    timings_ms: Mapping[str, float]
    warnings: tuple[str, ...]


#: The pipeline of a process that runs one bundle.
_loaded: list[Pipeline | ArcFlowError] = []


def _load(root: Path, request: Request) -> None:
    """Load the bundle. An error is kept for the first image, because an initializer cannot hand it over."""
    logging.getLogger("arcflow").setLevel(logging.ERROR)  # warnings are handed over with the images
    try:
        _loaded.append(Pipeline.load(root, request.backend, threads=request.threads))
    except ArcFlowError as e:
        _loaded.append(e)


def _generate(steps: int, case: DriftCase, request: Request) -> _Image:
    pipe = _loaded[0]
    if isinstance(pipe, ArcFlowError):
        raise pipe
    m = pipe.bundle.manifest
    kept: list[np.ndarray] = []
    # A callback keeps a GPU from running all steps as one CUDA graph, so there the latents are made in a second run.
    on_cpu = request.backend in ON_CPU
    true_cfg = m.true_cfg_scale is not None

    def run(output_type: str, keep: bool) -> PipelineOutput:
        return pipe(
            case.prompt,
            height=request.height_px,
            width=request.width_px,
            num_inference_steps=steps,
            guidance_scale=request.guidance_scale if m.guidance else None,
            seed=[case.seed],
            output_type=output_type,
            negative_prompt=request.negative_prompt if true_cfg else None,
            true_cfg_scale=request.true_cfg_scale if true_cfg else None,
            callback_on_step_end=(lambda _, latents: kept.append(latents)) if keep else None,
        )

    pipe.clear_cache()  # every image counts its own text
    output = run("pil", on_cpu)
    latents = kept[-1] if on_cpu else np.asarray(run("latents", False).images)
    return _Image(np.asarray(output.images[0]), np.array(latents[0]), output.timings_ms, output.warnings)


def _peak_bytes() -> int | None:
    """The peak of this process's resident memory; None if the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _calls(manifest: Manifest, subject: Subject, request: Request) -> int:
    """Network calls of one image: two a step with guidance by a negative prompt."""
    if manifest.true_cfg_scale is None:
        return subject.steps
    negative, _, _ = check_guidance(manifest, 1, request.negative_prompt, request.true_cfg_scale)
    return subject.steps * (1 if negative is None else 2)


def _joined(subject: Subject, images: Sequence[_Image], peak_bytes: int | None, calls: int) -> Generated:
    # Not timed: the first image, which loads what is loaded on first use, and the second, which captures a GPU's graph.
    timed = images[min(_WARM_UP, len(images) - 1) :]
    stages: dict[str, list[float]] = {name: [] for name in (*STAGES, OTHER)}
    for one in timed:
        ms = one.timings_ms
        known = {name: sum(ms.get(stage, 0.0) for stage in parts) for name, parts in STAGES.items()}
        for name, value in known.items():
            stages[name].append(value / 1e3)
        stages[OTHER].append((ms["total"] - sum(known.values())) / 1e3)
    return Generated(
        subject,
        calls,
        tuple(one.timings_ms["total"] / 1e3 for one in images),
        float(np.median([one.timings_ms["total"] / 1e3 for one in timed])),
        {name: float(np.median(values)) for name, values in stages.items()},
        peak_bytes,
        np.stack([one.latents for one in images]),
        np.stack([one.image for one in images]),
        tuple(dict.fromkeys(warning for one in images for warning in one.warnings)),
    )
