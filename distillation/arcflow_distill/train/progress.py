"""Show the progress of a training, and record its losses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

#: Iterations that are averaged into one entry of the history.
LOG_EVERY = 10
#: Seconds between updates of the progress bar if stderr is not a terminal.
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Figures:
    """The figures of one iteration; losses can be compared only at the same `ratio` (the teacher's share)."""

    loss: float
    ratio: float
    learning_rate: float
    gradient_norm: float


class Log:
    """Records mean figures of every `LOG_EVERY` iterations, and the seconds spent; prints only if `shown` is True."""

    def __init__(self, shown: bool):
        self.shown, self.seconds = shown, 0.0
        self.history: list[dict[str, float]] = []
        self._pending: list[dict[str, float]] = []

    def say(self, text: str) -> None:
        """Print to stderr."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    def add(self, iteration: int, figures: Figures) -> None:
        """Add the figures of an iteration, counted from 0."""
        self._pending.append(asdict(figures))
        if len(self._pending) == LOG_EVERY:
            means = {key: sum(f[key] for f in self._pending) / LOG_EVERY for key in self._pending[0]}
            self.history.append({"iteration": iteration + 1} | means)
            self._pending = []

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"seconds": self.seconds, "history": self.history, "pending": self._pending}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved `state`."""
        self.seconds, self.history, self._pending = state["seconds"], state["history"], state["pending"]

    @contextmanager
    def bar(self, start: int, total: int) -> Iterator[Callable[[int, Figures], None]]:
        """Show a progress bar; yields a function that takes an iteration's number and figures."""
        interval = 0.2 if sys.stderr.isatty() else _LOG_SECONDS
        with tqdm(
            total=total, initial=start, disable=not self.shown, mininterval=interval, maxinterval=interval, unit="it"
        ) as bar:

            def advance(iteration: int, figures: Figures) -> None:
                self.add(iteration, figures)
                shown = {"loss": f"{figures.loss:.4f}", "ratio": f"{figures.ratio:.2f}"}
                bar.set_postfix(shown | {"lr": f"{figures.learning_rate:.1e}"}, refresh=False)
                bar.update()

            yield advance
