"""Run an evaluation: a student's and the teacher's directory -> a report, written with tables and figures.

`arcflow eval` calls this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from arcflow_distill.errors import DistillError
from arcflow_distill.evaluate import paths
from arcflow_distill.evaluate.options import STUDENT_STEPS, EvaluationOptions
from arcflow_distill.evaluate.report import EvaluationReport, SamplerReport
from arcflow_distill.evaluate.samplers import EulerSampler, Generated, Sampler, TeacherPipeline, generate_all
from arcflow_distill.evaluate.scores import SCORED, Scorer
from arcflow_distill.evaluate.sheet import Section, contact_sheet
from arcflow_distill.evaluate.students import AdapterSampler, StudentSampler, open_target
from arcflow_export.images.cases import GROUPS, Cases, draw_cases, real_images
from arcflow_export.images.judge import STEPS, Judge, judge_rates, train_judge
from arcflow_export.images.scenes import MAX_SEQUENCE_LENGTH, RESOLUTION
from arcflow_export.options import SHIFT
from arcflow_export.progress import StageProgress
from arcflow_runtime.disk.files import whole_directory
from arcflow_runtime.errors import RequestError

#: Rows of the contact sheet, half from each group.
SHEET_ROWS = 10
TARGET = "arcflow"
_JSON = "eval.json"
_PACKAGES = ("arcflow", "torch", "diffusers", "transformers", "numpy", "onnxruntime")


def evaluate(
    target: Path,
    base: Path,
    out: Path,
    students: Mapping[str, Path] | None = None,
    judge: Path | None = None,
    options: EvaluationOptions | None = None,
    progress: StageProgress = lambda stage, done, total: None,
) -> EvaluationReport:
    """Generate the prompts with the teacher and the students, score the images, and write `out`.

    Args:
        target: directory of the student to evaluate, a bundle or an adapter.
        base: the teacher, a FLUX pipeline in diffusers format for 64x64 images.
        out: directory to write `eval.json`, `table.md`, `contact_sheet.png` and `paths.png` to, atomically.
        students: directories of further adapters to compare, by name.
        judge: directory of the judge; None uses `judge` beside `base`, or trains one.
        options: number of prompts and teacher's steps; None means the defaults.
        progress: receives each stage's name, the work done and its total.

    Raises:
        DistillError: `out` exists and is not an evaluation, or its parent does not exist.
        RequestError: a name in `students` is reserved.
        ArcFlowError: a directory is missing or damaged, or does not fit the teacher.
    """
    options, students = options or EvaluationOptions(), students or {}
    check_out(out)
    for name in students:
        if name in (TARGET, "real") or name.startswith("teacher-"):
            raise RequestError(f"a student's name must not be {TARGET}, real or teacher-..., got {name!r}")
    teacher = TeacherPipeline(base)
    opened: dict[str, StudentSampler] = {name: AdapterSampler(base, path) for name, path in students.items()}
    opened[TARGET] = open_target(target, base)
    found, judge_source = _judge(judge, base, options.seed, progress)

    cases = draw_cases(options.count, options.seed)
    eulers = {f"teacher-{n}": EulerSampler(teacher, n) for n in options.teacher_steps}
    samplers: dict[str, Sampler] = {**eulers, **opened}
    generated = _generate(samplers, cases, progress)
    reference, *baselines = eulers

    real, other_real = (real_images(cases, options.seed + i) for i in (1, 2))
    scorer = Scorer(cases, found, real, generated[reference], options.seed)
    labels = {n: f"teacher, {e.network_calls} steps" for n, e in eulers.items()}
    labels |= {n: f"{'ArcFlow' if n == TARGET else n}, {s.network_calls} steps" for n, s in opened.items()}
    reports = [SamplerReport("real", "real", 0, scorer.score_real(other_real))]
    for name, sampler in samplers.items():
        reports.append(SamplerReport(name, labels[name], sampler.network_calls, scorer.score(name, generated[name])))
        progress("score", len(reports) - 1, len(samplers))
    report = EvaluationReport(
        _settings(options, cases, target, base, students, judge_source),
        {package: version(package) for package in _PACKAGES},
        judge_rates(found, options.count, options.seed + 1),
        tuple(reports),
        tuple(scorer.difference(s, b, group) for s in opened for b in baselines for group in SCORED),
    )
    walks = paths.walk(cases, teacher, opened[TARGET], generated[TARGET], options.reference_steps)
    columns = {"real": _to_uint8(real)} | {labels[name]: d.images for name, d in generated.items()}
    with whole_directory(out) as folder:
        (folder / _JSON).write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(report.table(), encoding="utf-8")
        contact_sheet(_sections(cases, columns)).save(folder / "contact_sheet.png")
        paths.figure(walks, "ArcFlow", options.reference_steps).savefig(folder / "paths.png")
    return report


def check_out(out: Path) -> None:
    """Check that an evaluation can be written to `out`; called before any long work.

    Raises:
        DistillError: `out` exists and is not an evaluation, or its parent does not exist.
    """
    out = out.absolute()
    if not out.parent.is_dir():
        raise DistillError(f"--out: {out.parent} is not a directory; create it first")
    if out.is_symlink() or (out.exists() and not (out / _JSON).is_file()):
        raise DistillError(
            f"--out: {out} exists and is not an evaluation; it will not be overwritten, give another name"
        )


def _generate(samplers: Mapping[str, Sampler], cases: Cases, progress: StageProgress) -> dict[str, Generated]:
    """Generate all prompts with every sampler."""
    generated = {}
    for name, sampler in samplers.items():
        progress(name, 0, len(cases))
        generated[name] = generate_all(sampler, cases.captions, cases.seeds, partial(progress, name))
    return generated


def _judge(judge: Path | None, base: Path, seed: int, progress: StageProgress) -> tuple[Judge, str]:
    """The judge, and its origin: "given", "shipped" (beside the base), or "trained"."""
    if judge is not None:
        return Judge.load(judge), "given"
    shipped = base.absolute().parent / "judge"
    if shipped.is_dir():
        return Judge.load(shipped), "shipped"
    steps = iter(range(1, STEPS + 1))
    return train_judge(seed, lambda loss: progress("train the judge", next(steps), STEPS)), "trained"


def _settings(
    options: EvaluationOptions, cases: Cases, target: Path, base: Path, students: Mapping[str, Path], judge: str
) -> dict[str, object]:
    return {
        "target": target.absolute().name,
        "base": base.absolute().name,
        "students": {name: path.absolute().name for name, path in students.items()},
        "judge": judge,
        "count": options.count,
        "prompts": {group: len(cases.rows(group)) for group in GROUPS},
        "seed": options.seed,
        "teacher_steps": list(options.teacher_steps),
        "student_steps": STUDENT_STEPS,
        "shift": SHIFT,
        "resolution_px": RESOLUTION,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


def _sections(cases: Cases, columns: Mapping[str, np.ndarray]) -> list[Section]:
    """The rows of the contact sheet: the first prompts of each group (prompts are in random order)."""
    titles = ("pairs of shape and colour seen in training", "pairs never seen in training")
    sections = []
    for group, title in zip(GROUPS, titles, strict=True):
        rows = cases.rows(group)[: SHEET_ROWS // 2]
        images = {name.replace(", ", "\n"): column[rows] for name, column in columns.items()}
        sections.append(Section(title, [cases.captions[i] for i in rows], images))
    return sections


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [0, 1] -> [B, H, W, 3] uint8."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
