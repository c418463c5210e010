"""Progress of long stages: the interfaces that stages report to, and the bars that show it on a terminal.

Stages that move bytes (export, quantise) report to a `ByteProgress`. Stages that count work (drift gate, evaluation)
call a `StageProgress` function.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

#: Called with a stage's name, the amount of work done, and its total.
StageProgress = Callable[[str, int, int], None]


class ByteProgress(Protocol):
    """Receives the progress of stages that read or write bytes."""

    def stage(self, name: str, total_bytes: int) -> None:
        """Begin a stage; `total_bytes` is 0 if it moves no bytes."""

    def advance(self, num_bytes: int) -> None:
        """Report bytes that were read or written."""


class Silent:
    """A `ByteProgress` that shows nothing."""

    def stage(self, name: str, total_bytes: int) -> None:
        """Do nothing."""

    def advance(self, num_bytes: int) -> None:
        """Do nothing."""


class ByteBars:
    """A `ByteProgress` that shows a bar for the current stage, on a terminal only.

    `stages` records the bytes and seconds of each stage.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._began = 0.0
        self.stages: list[dict[str, Any]] = []

    def __enter__(self) -> ByteBars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def stage(self, name: str, total_bytes: int) -> None:
        """Begin a stage; `total_bytes` is 0 if it moves no bytes."""
        from tqdm import tqdm

        self._close()
        self._bar = tqdm(total=total_bytes or None, desc=name, unit="B", unit_scale=True, disable=None)
        self._bar.refresh()
        self._began = time.perf_counter()
        self.stages.append({"stage": name, "bytes": total_bytes})

    def advance(self, num_bytes: int) -> None:
        """Report bytes that were read or written."""
        self._bar.update(num_bytes)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self.stages[-1]["seconds"] = round(time.perf_counter() - self._began, 3)


def stage_bars() -> StageProgress:
    """A `StageProgress` that shows one bar per stage, on a terminal only; a bar closes when its stage is done."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, disable=None)
        bar = bars[stage]
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return progress
