"""Noise and update compiled (`speedups.cpp`): `compiled` is that module, or None where it was not built.

Noise is the same bit for bit either way, and updates are to the last place of float32.
"""

from __future__ import annotations

from types import ModuleType

compiled: ModuleType | None
try:
    from arcflow_runtime.maths import _speedups
except ImportError:  # there was no C++ compiler at the installation
    compiled = None
else:
    compiled = _speedups
