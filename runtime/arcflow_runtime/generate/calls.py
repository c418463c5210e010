"""Which threads are within a call of one pipeline: a step callback's own call becomes an error, not a deadlock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from arcflow_runtime.errors import RequestError


class Calls:
    """The calls of one pipeline; several threads may be within a call at the same time, none may be twice."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @contextmanager
    def enter(self, what: str) -> Iterator[None]:
        """Mark this thread as within a call for as long as the block lasts; arguments and errors as for `check`."""
        self.check(what)
        self._thread.within = True
        try:
            yield
        finally:
            self._thread.within = False

    def check(self, what: str) -> None:
        """Refuse `what`, such as "close()", from a step callback: it would wait for the call that waits for it.

        Raises:
            RequestError: this thread is within a call.
        """
        if getattr(self._thread, "within", False):
            raise RequestError(
                f"{what} must not be called by callback_on_step_end on the pipeline that called it; "
                "call it after the pipeline has returned, or use another pipeline"
            )
