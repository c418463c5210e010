"""Import the optional C++ versions of the noise and the update: `compiled` is that module, or None if it is missing.

`noise.py` and `update.py` call it. Noise is the same bit for bit either way; updates agree to the last place of
float32.
"""

from __future__ import annotations

from types import ModuleType

compiled: ModuleType | None
try:
    from arcflow_runtime.maths import _speedups
except ImportError:  # no C++ compiler was found when the package was installed
    compiled = None
else:
    compiled = _speedups
