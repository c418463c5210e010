"""Calibrate a student: student and prompts -> a scales file. A stopped run can be continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from arcflow_calibration.collect import Collector, describe, generate_batch, guidance, plan_batches
from arcflow_calibration.memory import plan_memory
from arcflow_calibration.options import CalibrationSettings
from arcflow_calibration.state import check_out, check_state, held, load_state, save_state, settings_of, state_path
from arcflow_export.errors import CalibrationError
from arcflow_export.families import facts
from arcflow_export.formats.prompts import Prompts
from arcflow_export.formats.scales import STEPPED, Scales
from arcflow_export.student.load import Student
from arcflow_export.student.reference import TorchStudent


def calibrate(
    student: Student,
    prompts: Prompts,
    settings: CalibrationSettings,
    out: Path,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Scales:
    """Collect the ranges and write them to `out`.

    After every batch, the state is saved beside `out`. A later call with the same settings and weights continues from
    it, and gives the same result, bit for bit, as a run without a stop. A student that does not fit in memory is read
    from disk as it is used, with the same result, bit for bit.

    Args:
        student: from `load_student`.
        prompts: from `read_prompts`.
        settings: what to collect and how.
        out: the scales file to write.
        overwrite: replace `out`; and start again if a stopped run had other settings.
        progress: receives a message if weights are read from disk, with its cost.

    Raises:
        CalibrationError: `out` exists; a part is unknown; even one layer does not fit in memory; a stopped run had
            other settings or weights; an activation is NaN or Inf.
    """
    known = (STEPPED, *facts(student.family).calibrated)
    if unknown := [part for part in settings.parts if part not in known]:
        raise CalibrationError(
            f"--parts: must be among {', '.join(known)} for a {student.family} student, got {', '.join(unknown)}"
        )
    guidance_scale = guidance(student, settings)
    check_out(out, overwrite)
    with held(out):
        state, identity = state_path(out), settings_of(student, prompts, settings)
        if state.exists():
            try:
                check_state(state, identity)
            except CalibrationError:
                if not overwrite:
                    raise
                state.unlink()
        on_disk, message = plan_memory(student, settings)
        if message:
            progress(message)
        torch_student = TorchStudent(
            student,
            getattr(torch, settings.dtype),
            device=settings.device,
            offload=on_disk,
            shift=settings.shift,
            timestep_ratio=settings.timestep_ratio,
            straight=settings.straight,
        )
        scales = _collect(student, torch_student, prompts, settings, guidance_scale, state, identity)
        scales.save(out)
        state.unlink(missing_ok=True)
    return scales


def _collect(
    student: Student,
    torch_student: TorchStudent,
    prompts: Prompts,
    settings: CalibrationSettings,
    guidance_scale: float | None,
    state: Path,
    identity: dict[str, object],
) -> Scales:
    collector = Collector(student, torch_student, settings)
    batches = plan_batches(prompts, settings)
    done = load_state(state, collector, identity) if state.exists() else 0
    with tqdm(total=len(prompts.texts), unit="prompt", desc="calibrating", disable=None) as bar:
        bar.update(sum(len(batch.prompts) for batch in batches[:done]))
        for i, batch in enumerate(batches[done:], done + 1):
            generate_batch(torch_student, batch, settings, guidance_scale, collector)
            save_state(state, collector, identity, i)
            bar.update(len(batch.prompts))
    return describe(student, prompts, settings, collector.ranges())


def default_device() -> str:
    """ "cuda" if torch has a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
