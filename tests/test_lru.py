"""The runtime's cache of recent values: which ones it drops, by number and by bytes."""

from __future__ import annotations

import numpy as np

from arcflow_runtime.engines.lru import LruCache
from arcflow_runtime.engines.modulation import ModulationCache


def kept(cache):
    return [key for key in "abcd" if cache.get(key) is not None]


def test_the_least_recently_used_one_is_dropped():
    cache = LruCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert kept(cache) == ["a", "c"]


def test_bytes_are_bounded_but_the_last_value_stays():
    cache = LruCache(9, max_bytes=10)
    for key, num_bytes in (("a", 4), ("b", 4), ("c", 4)):
        cache.put(key, key, num_bytes)
    assert kept(cache) == ["b", "c"]
    cache.put("b", "new", 6)  # in place of the old one, not beside it
    assert kept(cache) == ["b", "c"]
    assert cache.get("b") == "new"
    cache.put("d", "d", 11)
    assert kept(cache) == ["d"]
    cache.clear()
    for key in "ab":
        cache.put(key, key, 5)
    assert kept(cache) == ["a", "b"]


def test_modulations_count_their_bytes():
    cache = ModulationCache(9, max_bytes=200)
    inputs = [{"timesteps": np.full(1, i, np.float32)} for i in range(3)]
    for given in inputs:
        cache.put(given, np.zeros(20, np.float32))
    assert [cache.get(given) is not None for given in inputs] == [False, True, True]
