"""Delay Ctrl-C and SIGTERM until the current training iteration is complete, so that a consistent state is saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context manager that records the first signal; a second one has its usual effect at once.

    A signal that the process ignores, as under nohup, stays ignored. Outside the main thread it does nothing, because
    signals cannot be handled there.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def came(self) -> bool:
        """True if any process got a signal. All processes must call this equally often."""
        if self._accelerator.num_processes == 1:
            return self._came is not None
        flag = torch.tensor(float(self._came is not None), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum") > 0)

    def deliver(self) -> None:
        """Raise the delayed signal with its usual effect; SIGINT if another process got the signal."""
        self._restore()
        signal.raise_signal(self._came or signal.SIGINT)
        raise KeyboardInterrupt  # reached only if the signal's handler returned

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
