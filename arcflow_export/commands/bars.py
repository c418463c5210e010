"""Progress bars for the commands that write bundles."""

from __future__ import annotations

import time
from typing import Any


class Bars:
    """Shows a bar for the current stage, on a terminal only. `stages` records the bytes and seconds of each stage."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._began = 0.0
        self.stages: list[dict[str, Any]] = []

    def __enter__(self) -> Bars:
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
