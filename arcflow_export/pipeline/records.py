"""The files beside a compiled student: `.NAME.stages.json` records earlier runs, `.NAME.lock` keeps two runs apart.

The format is specified in `docs/compile.md`.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from arcflow_export.errors import ExportError
from arcflow_runtime.disk.files import whole_file
from arcflow_runtime.disk.parse import parse, read_json
from arcflow_runtime.errors import BundleError

FORMAT, VERSION = "arcflow-stages", 1


@dataclass(frozen=True)
class StageRecord:
    """The last run of one stage.

    `key` is `Stage.key` at that time. While the stage runs, `before` is the identity of the output that it will
    replace, or None. When it has ended, `output` is the identity of its output.
    """

    stage: str
    key: str
    state: Literal["running", "done", "failed"]
    before: str | None = None
    output: str | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass
class StageRecords:
    """The records file: each output's record by the output's name, and commits on the hub by id and revision."""

    path: Path
    outputs: dict[str, StageRecord] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> StageRecords:
        """Read the file; returns empty records if it does not exist.

        Raises:
            ExportError: it is damaged, of another version, or has an unknown key.
        """
        if not path.exists():
            return StageRecords(path)
        again = "remove it to start again"
        try:
            data = read_json(path.read_bytes())
        except (ValueError, RecursionError) as e:
            raise ExportError(f"{path} is not valid JSON ({e}); {again}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ExportError(f"{path}: 'format' must be {FORMAT!r}; {again}")
        if data.get("version") != VERSION:
            raise ExportError(f"{path}: version must be {VERSION}, got {data.get('version')!r}; {again}")
        try:
            file: _File = parse(_File, data, str(path))
        except BundleError as e:
            raise ExportError(f"{e}; {again}") from None
        return StageRecords(path, dict(file.outputs), dict(file.commits))

    def put(self, name: str, record: StageRecord) -> None:
        """Set one record and write the file."""
        self.outputs[name] = record
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        outputs = {name: dataclasses.asdict(record) for name, record in self.outputs.items()}
        data = {"format": FORMAT, "version": VERSION, "commits": self.commits, "outputs": outputs}
        with whole_file(self.path) as partial:
            partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    commits: Mapping[str, str]
    outputs: Mapping[str, StageRecord]


@contextmanager
def only_run(path: Path, waits: Callable[[], None]) -> Iterator[int]:
    """Hold the lock file `path`; if another process holds it, call `waits` and wait.

    Yields the descriptor of the lock. The lock lasts until every process that inherited the descriptor has ended. The
    file is not removed, because a lock on a removed file excludes nobody.

    Raises:
        ExportError: the file system does not support locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            raise ExportError(f"--out: the file system of {path.parent} has no locks; give a folder on another") from e
        yield handle
    finally:
        os.close(handle)
