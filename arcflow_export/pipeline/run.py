"""Run a compile job: each stage in its own process, finished stages skipped, a killed run continued."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arcflow_export.errors import ExportError
from arcflow_export.pipeline.process import Ended, run_process
from arcflow_export.pipeline.records import StageRecord, StageRecords, only_run
from arcflow_export.pipeline.stages import (
    BUILD,
    CALIBRATE,
    DOWNLOAD,
    EXPORT,
    VERIFY,
    CompileJob,
    Stage,
    commit_name,
    plan_stages,
)
from arcflow_export.pipeline.table import CHECKED, DONE, FAILED, GIVEN, RAN, TO_DO, StageRow, plan_table, result_table
from arcflow_runtime.errors import RequestError

_FAILED = 1
_STDERR = 2
_KILLED = 9


@dataclass
class CompileRun:
    """One run of a job. Messages go to `say`; with `as_json` the output of the stages goes to stderr."""

    job: CompileJob
    say: Callable[[str], None]
    as_json: bool
    rows: list[StageRow] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    lock: int | None = None

    def plan(self, arguments: Sequence[str]) -> None:
        """Print the plan without running it."""
        self._survey(StageRecords.read(self._file("stages.json")), arguments)

    def compile(self, arguments: Sequence[str]) -> int:
        """Run every stage that is not done. Returns the exit code: 0, or that of the failed stage.

        Args:
            arguments: arguments for `arcflow plan`, which estimates the stages.

        Raises:
            RequestError: the folder cannot be created.
            ExportError: a stage does not fit, the records are damaged, or the file system has no locks.
            KeyboardInterrupt, SystemExit: this process was told to stop.
        """
        folder = self.job.out
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RequestError(f"--out: {folder} cannot be created ({e.strerror}); give another folder") from None

        def waits() -> None:
            print(
                f"another run is compiling {self.job.student.name} in {folder}; waiting for it to end", file=sys.stderr
            )

        with only_run(self._file("lock"), waits) as self.lock:
            records = StageRecords.read(self._file("stages.json"))
            try:
                self._survey(records, arguments)
                self._check_fits()
                code = self._run_all(records)
            except (KeyboardInterrupt, SystemExit):
                print("stopped; run the same command again to continue", file=sys.stderr)
                raise
        self.say("\n" + result_table(self.rows))
        return code

    def as_dict(self) -> dict[str, Any]:
        """The rows and the machine as JSON values."""
        rows = [asdict(r) | {"output": None if r.output is None else str(r.output)} for r in self.rows]
        bundle = str(self.job.result.path)
        made = {"student": self.job.student.name, "bundle": bundle, "backend": self.job.backend}
        return made | {"stages": rows, "machine": self.machine}

    def _file(self, suffix: str) -> Path:
        return self.job.out / f".{self.job.student.name}.{suffix}"

    def _survey(self, records: StageRecords, arguments: Sequence[str]) -> None:
        """Find out which stages must run, estimate them, and print the plan."""
        stages = plan_stages(self.job, records.commits)
        written: set[Path] = set()
        for stage in stages:
            stale = any(i.output is not None and i.output.path in written for i in stage.inputs)
            state = TO_DO if stale else _state(self.job, stage, records.outputs.get(stage.record))
            if state == TO_DO and stage.output is not None:
                written.add(stage.output.path)
            self.rows.append(StageRow(stage.name, state, stage.output.path if stage.output else stage.folder))
        if self.rows[0].stage == DOWNLOAD and not self._reads_sources():
            self.rows[0].state = DONE
        if any(r.state == TO_DO for r in self.rows):
            self._ask(arguments)
        if self.job.quantized is not None and not self.job.gate:
            exported, bundle = self.job.exported.path, self.job.result.path
            self.say(f"the drift gate is left out; run it later with: arcflow verify {bundle} --against {exported}")
        self.say(plan_table(self.rows) + "\n")

    def _reads_sources(self) -> bool:
        return any(r.state == TO_DO for r in self.rows if r.stage in (EXPORT, CALIBRATE))

    def _ask(self, arguments: Sequence[str]) -> None:
        """Fill in the estimates of `arcflow plan`; if it fails, the table has no figures."""
        ended = run_process(["plan", *arguments, "--json"], self.lock, subprocess.PIPE)
        try:
            found = json.loads(ended.output)
            figures = {stage["stage"]: stage for stage in found["stages"]}
            self.machine = dict(found["machine"])
        except (ValueError, KeyError, TypeError):
            self.say("`arcflow plan` gave no figures of time, memory and disk")
            return
        for row in self.rows:
            figure = figures.get(row.stage, {})
            row.note = figure.get("note") or ""
            row.planned_seconds = figure.get("seconds")
            row.planned_memory_bytes = figure.get("memory_bytes")
            row.planned_disk_bytes = figure.get("disk_bytes")

    def _check_fits(self) -> None:
        """Stop before the first stage if a later stage cannot fit; a download may go to another disk, so it is not
        checked.
        """
        notes = [r.note for r in self.rows if r.note and r.state == TO_DO and r.stage != DOWNLOAD]
        if notes and not self.job.anyway:
            raise ExportError(f"{'; '.join(notes)} (--anyway starts it nevertheless)")

    def _run_all(self, records: StageRecords) -> int:
        for i, row in enumerate(self.rows):
            # The download finds the commits, and the stages after it depend on them, so plan again.
            stage = plan_stages(self.job, records.commits)[i]
            code = self._run_one(stage, row, records)
            if code:
                row.state = FAILED
                return code
        return 0

    def _run_one(self, stage: Stage, row: StageRow, records: StageRecords) -> int:
        if stage.name == DOWNLOAD:
            return 0 if row.state == DONE else self._download(stage, row, records)
        record, key = records.outputs.get(stage.record), stage.key()
        row.state = _state(self.job, stage, record)
        if row.state in (DONE, GIVEN):
            if row.state == DONE and record is not None:
                if record.state == "running":
                    # The process was killed after it had renamed its output into place.
                    assert stage.output is not None
                    stage.output.clear_leftovers()
                    record = StageRecord(stage.name, record.key, "done", output=stage.output.identity())
                    records.put(stage.record, record)
                row.seconds, row.peak_bytes = record.seconds, record.peak_bytes
            assert stage.output is not None
            row.bytes = stage.output.bytes()
            self.say(f"{stage.name}: {row.state}, {stage.output.path}")
            return 0
        if key is None:
            missing = ", ".join(str(i.path) for i in stage.inputs if i.identity() is None)
            raise ExportError(f"{stage.name}: {missing} is missing; if it was removed just now, run the command again")
        return self._run_stage(stage, row, key, records)

    def _run_stage(self, stage: Stage, row: StageRow, key: str, records: StageRecords) -> int:
        output = stage.output
        before = None if output is None else output.identity()
        records.put(stage.record, StageRecord(stage.name, key, "running", before))
        began = time.monotonic()
        ended = self._start(stage, _STDERR if self.as_json else None)
        row.seconds, row.peak_bytes = round(time.monotonic() - began, 3), ended.peak_bytes
        after = None if output is None else output.identity()
        if ended.code >= 0:  # a killed stage keeps its "running" record, because its output may be complete
            state = "failed" if ended.code else "done"
            record = StageRecord(stage.name, key, state, None, after, row.seconds, row.peak_bytes)  # type: ignore[arg-type]
            records.put(stage.record, record)
        if output is not None:
            row.bytes = output.bytes() if after is not None else None
        elif stage.folder is not None:
            row.bytes = sum(p.stat().st_size for p in stage.folder.rglob("*") if p.is_file())
        row.state = RAN
        failed_gate = output is not None and after not in (None, before) and not output.passed()
        return _explain(stage.name, ended.code, failed_gate and ended.code == _FAILED)

    def _download(self, stage: Stage, row: StageRow, records: StageRecords) -> int:
        began = time.monotonic()
        ended = self._start(stage, subprocess.PIPE)
        row.seconds, row.peak_bytes, row.state = round(time.monotonic() - began, 3), ended.peak_bytes, RAN
        if ended.code:
            return _explain(stage.name, ended.code, False)
        found = json.loads(ended.output)["checkpoints"]
        row.bytes = sum(f["bytes"] for f in found)
        for checkpoint, fetched in zip(self.job.student.checkpoints, found, strict=True):
            if checkpoint.path is None:
                records.commits[commit_name(checkpoint)] = fetched["revision"]
                self.say(f"{fetched['name']} at {fetched['revision']}: {fetched['path']}")
        records.write()
        return 0

    def _start(self, stage: Stage, stdout: int | None) -> Ended:
        self.say(f"{stage.name}: arcflow {' '.join(stage.command)}")
        sys.stdout.flush()
        return run_process(stage.command, self.lock, stdout)


def _state(job: CompileJob, stage: Stage, record: StageRecord | None) -> str:
    """The state of a stage, from its record, its key and its output on disk."""
    if stage.name == BUILD:
        # `arcflow build` itself checks which engines are unchanged.
        return CHECKED if record is not None and record.state == "done" and record.key == stage.key() else TO_DO
    if stage.output is None:
        return TO_DO
    there = stage.output.identity()
    if stage.name == CALIBRATE and job.scales is not None and there is not None and not _ours(record, there):
        return GIVEN
    if record is None or there is None or record.key != stage.key():
        return TO_DO
    if record.state == "running":
        return DONE if there != record.before and stage.output.passed() else TO_DO
    return DONE if record.state == "done" and there == record.output else TO_DO


def _ours(record: StageRecord | None, there: str) -> bool:
    """True if the output on disk was written by an earlier run, and is not the user's own file."""
    if record is None:
        return False
    return there == record.output or (record.state == "running" and there != record.before)


def _explain(stage: str, code: int, failed_gate: bool) -> int:
    """Tell the user how to continue after a failed stage. Returns the exit code."""
    if code == 0:
        return 0
    again = "run the same command again; finished stages are kept"
    if code == -_KILLED:
        why = f"{stage} was killed, maybe because memory ran out; {again}"
    elif code < 0:
        why = f"{stage} was ended by signal {-code}; {again}"
    elif stage == VERIFY and failed_gate:
        why = "the drift gate failed, see its tables; leave layers out with --policy FILE, or skip it with --no-gate"
    else:
        why = f"{stage} failed; fix its error and {again}"
    print(f"arcflow compile: error: {why}", file=sys.stderr)
    return 128 - code if code < 0 else code
