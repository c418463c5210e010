"""A bounded cache of the conditioner's results: the arrays that it was given -> modulation.

The conditioner of FLUX is a quarter of its weights, and in the modes "balanced" and "low" it must be loaded to run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping

import numpy as np

#: Number of modulations that are cached; one FLUX image of two steps takes about 8 MB in float32.
CACHED_MODULATIONS = 16


class ModulationCache:
    """A least-recently-used cache, keyed by the conditioner's inputs and LoRAs; thread-safe."""

    def __init__(self, size: int = CACHED_MODULATIONS) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[object, ...], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, inputs: Mapping[str, np.ndarray], loras: Hashable = None) -> np.ndarray | None:
        """The modulation for these inputs, read-only, or None. `loras` is the key of the LoRAs in the conditioner."""
        key = (loras, *_key(inputs))
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, inputs: Mapping[str, np.ndarray], modulation: np.ndarray, loras: Hashable = None) -> None:
        """Cache a modulation, which becomes read-only; if the cache is full, drop the least recently used one."""
        modulation.setflags(write=False)
        key = (loras, *_key(inputs))
        with self._lock:
            self._entries[key] = modulation
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()


def _key(inputs: Mapping[str, np.ndarray]) -> tuple[object, ...]:
    return tuple((name, x.dtype.str, x.shape, x.tobytes()) for name, x in sorted(inputs.items()))
