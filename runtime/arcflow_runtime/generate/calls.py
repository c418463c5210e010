"""Detect a step callback that calls its own pipeline: raises an error in place of a deadlock. Used by `Pipeline`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from arcflow_runtime.errors import RequestError


class Calls:
    """Tracks which threads are inside a call of one pipeline. Several threads may be, each at most once."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextmanager
    def enter(self, what: str) -> Iterator[None]:
        """Mark this thread as inside a call during the `with` block; see `check` for arguments and errors."""
        self.check(what)
        self._thread.within = True
        try:
            yield
        finally:
            self._thread.within = False

    def check(self, what: str) -> None:
        """Check that this thread is not inside a call, where the same call again would wait for itself.

        Args:
            what: the function being called, such as "close()", for the message.

        Raises:
            RequestError: it is, so the call comes from a step callback.
        """
        if getattr(self._thread, "within", False):
            raise RequestError(
                f"{what} must not be called by a callback on the pipeline that called it; "
                "call it after the pipeline has returned, or use another pipeline"
            )
