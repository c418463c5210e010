"""A bounded least-recently-used cache: key -> value."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """At most `size` values of at most `max_bytes` together, but always the last one; thread-safe."""

    def __init__(self, size: int, max_bytes: int | None = None) -> None:
        self._size = size
        self._max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value for this key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return None if found is None else found[0]

    def put(self, key: K, value: V, num_bytes: int = 0) -> None:
        """Cache a value, which counts `num_bytes`; if the cache is full, drop those least recently used."""
        with self._lock:
            if (replaced := self._entries.pop(key, None)) is not None:
                self._bytes -= replaced[1]
            self._entries[key] = value, num_bytes
            self._bytes += num_bytes
            while len(self._entries) > 1 and self._full():
                self._bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _full(self) -> bool:
        return len(self._entries) > self._size or (self._max_bytes is not None and self._bytes > self._max_bytes)
