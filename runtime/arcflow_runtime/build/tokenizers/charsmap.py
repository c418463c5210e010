"""Encode character replacements: a map from characters to texts -> SentencePiece's `precompiled_charsmap` bytes.

`graph.py` uses it for normalizers. The layout: the size of the trie in bytes (uint32), the trie, then the texts, each
terminated by a zero byte. The trie is a double array as in darts-clone (github.com/s-yata/darts-clone) of 32-bit units:
the child of the node at index `i` for byte `c` is at `i ^ offset ^ c`. A node's value, the offset of its text, is at
its child for byte 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_HAS_VALUE = 1 << 8
_IS_VALUE = 1 << 31
#: Label of unused units: 0xFF never occurs in UTF-8, so a lookup never reaches one.
_UNUSED = 0xFF
_BLOCK = 256
_MAX_OFFSET = 1 << 21


def build_charsmap(replaced: Mapping[str, str]) -> bytes:
    """Encode a map: each key of `replaced`, one code point, is replaced by its text."""
    texts, values = bytearray(), {}
    for char, text in replaced.items():
        values[char.encode()] = len(texts)
        texts += text.encode() + b"\0"
    trie = _double_array(values)
    return np.uint32(len(trie) * 4).tobytes() + trie.tobytes() + bytes(texts)


def _double_array(values: Mapping[bytes, int]) -> np.ndarray:
    children: dict[bytes, list[int]] = {b"": []}
    for key in sorted(values):
        for end in range(len(key)):
            labels = children.setdefault(key[:end], [])
            if key[end] not in labels:
                labels.append(key[end])
    units = [_UNUSED] * _BLOCK
    used = {0}
    units[0] = 0
    first_free = 1
    nodes = [(b"", 0)]
    while nodes:
        prefix, index = nodes.pop()
        labels = ([0] if prefix in values else []) + children.get(prefix, [])
        while first_free in used:
            first_free += 1
        base = next(
            b
            for free in range(first_free, _MAX_OFFSET)
            if free not in used and (b := free ^ labels[0]) and not any(b ^ c in used for c in labels)
        )
        while base >= len(units):
            units += [_UNUSED] * _BLOCK
        offset = index ^ base
        assert offset < _MAX_OFFSET, "more characters than Unicode's letters"
        units[index] |= offset << 10 | (_HAS_VALUE if prefix in values else 0)
        for label in labels:
            child = base ^ label
            used.add(child)
            if label == 0:
                units[child] = _IS_VALUE | values[prefix]
            else:
                units[child] = label
                nodes.append((prefix + bytes([label]), child))
    return np.array(units, np.uint32)
