"""The interface between the pipeline and what runs a graph: named arrays in -> named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from ..bundle import Bundle


class Engine(Protocol):
    """One loaded part of a bundle, ready to run; safe to call from several threads."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: one array per input of the part's manifest entry, of its dtype and shape.

        Returns:
            One array per output of the part's manifest entry.

        Raises:
            EngineError: the engine failed; the message names the part.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. Calling it twice is allowed; running afterwards is an error."""
        ...


class Backend(Protocol):
    """Opens parts of bundles as engines."""

    def check(self, bundle: Bundle) -> None:
        """Raise `EngineError` if this backend cannot run `bundle`, before anything is loaded."""
        ...

    def open(self, bundle: Bundle, part: str) -> Engine:
        """Load part `part` of `bundle`."""
        ...
