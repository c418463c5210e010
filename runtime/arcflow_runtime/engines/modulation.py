"""A bounded cache of the conditioner's results: the arrays that it was given -> modulation.

The conditioner of FLUX is a quarter of its weights, and in the modes "balanced" and "low" it must be loaded to run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from arcflow_runtime.engines.lru import LruCache

#: Number of modulations that are cached, and their bytes; FLUX takes about 4 MB a step in float32.
CACHED_MODULATIONS = 16
CACHED_MODULATION_BYTES = 512 << 20


class ModulationCache:
    """A least-recently-used cache, keyed by the conditioner's inputs and LoRAs; thread-safe."""

    def __init__(self, size: int = CACHED_MODULATIONS, max_bytes: int = CACHED_MODULATION_BYTES) -> None:
        self._cache: LruCache[tuple[object, ...], np.ndarray] = LruCache(size, max_bytes)

    def get(self, inputs: Mapping[str, np.ndarray], loras: Hashable = None) -> np.ndarray | None:
        """The modulation for these inputs, read-only, or None. `loras` is the key of the LoRAs in the conditioner."""
        return self._cache.get((loras, *_key(inputs)))

    def put(self, inputs: Mapping[str, np.ndarray], modulation: np.ndarray, loras: Hashable = None) -> None:
        """Cache a modulation, which becomes read-only; if the cache is full, drop those least recently used."""
        modulation.setflags(write=False)
        self._cache.put((loras, *_key(inputs)), modulation, modulation.nbytes)

    def clear(self) -> None:
        """Drop everything."""
        self._cache.clear()


def _key(inputs: Mapping[str, np.ndarray]) -> tuple[object, ...]:
    return tuple((name, x.dtype.str, x.shape, x.tobytes()) for name, x in sorted(inputs.items()))
