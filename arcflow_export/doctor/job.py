"""Check a machine for a compile job: hub, licence, libraries, GPU, memory and disk of every stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_export.doctor.findings import Finding, failure
from arcflow_export.doctor.libraries import check_libraries
from arcflow_export.doctor.machine import existing
from arcflow_export.doctor.measured import measured
from arcflow_runtime.engines.host_memory import available_bytes
from arcflow_runtime.errors import ArcFlowError

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.pipeline.stages import CompileJob
    from arcflow_export.pipeline.students import Checkpoint

#: Stage -> the extra that brings its libraries; all stages need `export`.
_EXTRAS = {"calibrate": "calibrate", "build": "tensorrt-rtx"}

_NETWORK = (
    "check the network, the proxy (HTTPS_PROXY) or the mirror (HF_ENDPOINT); if the files are in the cache already, "
    "give --offline"
)


def check_job(job: CompileJob, before_estimate: Callable[[], None] = lambda: None) -> list[Finding]:
    """Check this machine for every stage of a compile job. Downloads configs, but no weights.

    Args:
        job: the compile job.
        before_estimate: called before the libraries of the exporter are used.
    """
    from arcflow_export.pipeline.stages import plan_stages

    stages = [stage.name for stage in plan_stages(job, {})]
    checkpoints = _checkpoints(job)
    found = [*_libraries(job, stages), _target(job), *checkpoints]
    reachable = all(f.state != "fail" for f in (*found[:1], *checkpoints))
    costs = (
        _estimates(job, before_estimate) if reachable else "the checkpoints or the libraries that it needs are missing"
    )
    if isinstance(costs, str):
        found.append(Finding("estimate", "note", costs, "mend what failed above, then run the same command again"))
        return [*found, *_measured_stages(job, stages)]
    return [*found, *_stages(job, costs)]


def _libraries(job: CompileJob, stages: Sequence[str]) -> list[Finding]:
    found = [check_libraries("export", "export", needed=True)]
    for stage in stages:
        # The library of data centres' GPUs has no extra; the backend's own line says how to install it.
        if stage in _EXTRAS and not (stage == "build" and job.backend == "tensorrt"):
            found.append(check_libraries(_EXTRAS[stage], stage, needed=True))
    return found


def _target(job: CompileJob) -> Finding:
    from arcflow_export.pipeline.check import check_target

    if job.backend == "onnxruntime":
        return Finding("target", "ok", "this CPU, with ONNX Runtime")
    try:
        check_target(job)
    except ArcFlowError as e:
        return failure("target", str(e))
    return Finding("target", "ok", f"{job.target or 'the GPU here'}, with {job.backend}, in {job.precision}")


def _checkpoints(job: CompileJob) -> list[Finding]:
    """A line for every checkpoint. After the hub could not be reached once, it is not asked again."""
    student = job.student
    named = [("base", student.base), ("adapter", student.adapter)]
    named += [(f"LoRA {i + 1}", lora) for i, lora in enumerate(student.loras)]
    found: list[Finding] = []
    for what, checkpoint in named:
        if checkpoint is None:  # a student may be a base alone
            continue
        if checkpoint.path is not None:
            found.append(Finding(what, "ok", f"{checkpoint.path / (checkpoint.subfolder or '')} on this machine"))
        elif any(_unreachable(f) for f in found):
            found.append(Finding(what, "fail", f"{checkpoint.name}: not asked, see above", "see above"))
        else:
            found.append(_on_hub(what, checkpoint, job))
    return found


def _unreachable(finding: Finding) -> bool:
    return finding.state == "fail" and ("cannot be reached" in finding.found or "hub's client" in finding.found)


def _on_hub(what: str, checkpoint: Checkpoint, job: CompileJob) -> Finding:
    from arcflow_runtime.hub.bundles import need_client

    choose, kind = _files_of(what)
    try:
        need_client(f"{what}: {checkpoint.name} on the hub needs the hub's client")
        from arcflow_export.checkpoint.sources import Location, measure
        from arcflow_runtime.hub.repository import check_access

        location = Location(checkpoint.name, checkpoint.subfolder, checkpoint.revision, job.offline)
        if not job.offline:
            check_access(checkpoint.name, what)
        size = measure(location, kind, choose)
    except ArcFlowError as e:
        found = failure(what, str(e).removeprefix(f"{what}: "))
        return replace(found, do=_NETWORK) if _unreachable(found) and "reached" in found.found else found
    missing = size.bytes - size.cached_bytes
    rest = f"{missing / 1e9:.1f} GB to download" if missing else "all of it in the cache"
    return Finding(what, "ok", f"{size.name} may be read, {size.bytes / 1e9:.1f} GB, {rest}")


def _files_of(what: str) -> tuple[Callable[..., list[str]], str]:
    from arcflow_export.checkpoint.layout import adapter_files, base_files, lora_files

    known = {"base": (base_files, "base"), "adapter": (adapter_files, "adapter")}
    return known.get(what, (lora_files, what))


def _estimates(job: CompileJob, before: Callable[[], None]) -> list[Cost] | str:
    """The estimate of every stage, or why there is none."""
    from arcflow_export.costs.machine import typical
    from arcflow_export.pipeline.forecast import forecast

    before()
    try:
        return forecast(job, typical(existing(job.out)))
    except ArcFlowError as e:
        return str(e)


def _stages(job: CompileJob, costs: Sequence[Cost]) -> list[Finding]:
    """A line for every stage with its estimate, and one for the disk of all of them together."""
    from arcflow_export.costs.costs import misfit
    from arcflow_export.costs.machine import typical

    machine = typical(existing(job.out))
    found = []
    for cost in costs:
        name, text = f"stage {cost.stage}", cost.sentence().removeprefix(f"{cost.stage}: ")
        elsewhere = _elsewhere(job, cost.stage)
        found.append(Finding(name, "ok", f"{text} at a small server's speed{elsewhere and '; ' + elsewhere}"))
        if (said := misfit(cost, machine)) is not None:
            found[-1] = failure(name, said)
    if (known := measured(job.student.name)) is not None:
        found.append(Finding("elsewhere", "note", f"is {known.where}"))
    return [*found, _disk(job, [(c.stage, c.disk_bytes) for c in costs])]


def _measured_stages(job: CompileJob, stages: Sequence[str]) -> list[Finding]:
    """What the stages took elsewhere, and the disk that they will need; nothing for a student that was not measured."""
    known, free = measured(job.student.name), available_bytes()
    if known is None:
        return []
    found = []
    for stage in stages:
        if (row := known.stages.get(stage)) is None:
            continue
        name, text = f"stage {stage}", _elsewhere(job, stage)
        if free is not None and row.peak_bytes > free and not job.anyway:
            text += f"; {free / (1 << 30):.1f} GiB are free here"
            found.append(Finding(name, "fail", text, "use a machine with more memory, or try with --anyway"))
        else:
            found.append(Finding(name, "note", text))
    sizes = [("download", known.download_bytes)] if "download" in stages else []
    sizes += [(s, known.stages[s].disk_bytes) for s in stages if s in known.stages]
    return [Finding("elsewhere", "note", f"is {known.where}"), *found, _disk(job, sizes)]


def _elsewhere(job: CompileJob, stage: str) -> str:
    """What a stage took on another machine, or "" if that is not known."""
    known = measured(job.student.name)
    row = None if known is None else known.stages.get(stage)
    if row is None:
        return ""
    return f"took {row.seconds / 60:.1f} min and {row.peak_bytes / (1 << 30):.1f} GiB elsewhere ({row.what})"


def _disk(job: CompileJob, sizes: Sequence[tuple[str, int]]) -> Finding:
    """Compare the disk that all stages together need with what is free, for each disk they write to."""
    where = {"download": _cache()}
    needed: dict[int, list[tuple[Path, int]]] = {}
    for stage, nbytes in sizes:
        folder = existing(where.get(stage, job.out))
        needed.setdefault(folder.stat().st_dev, []).append((folder, nbytes))
    texts, short = [], []
    for rows in needed.values():
        folder, total = rows[-1][0], sum(nbytes for _, nbytes in rows)
        free = shutil.disk_usage(folder).free
        texts.append(f"{total / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free in {folder}")
        if total > free:
            short.append(f"{(total - free) / 1e9:.1f} GB on the disk of {folder}")
    text = "; ".join(texts) or "nothing to write"
    if not short:
        return Finding("disk of all stages", "ok", text)
    do = f"free {' and '.join(short)}, or give --out (and for downloads HF_HOME) on a larger disk"
    return Finding("disk of all stages", "fail", text, do)


def _cache() -> Path:
    """The hub's cache, or the folder that it will be in."""
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return Path.home()
    return Path(constants.HF_HUB_CACHE).expanduser()
