"""Compute the modulation: timesteps [S], guidance and pooled text [U, Dp] -> [S, U, M] or [S, 1, M].

The modulation holds the AdaLN parameters of all blocks, which depend on these inputs only and not on the image.
"""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError, safe_open

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.modulation import ModulationCache
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import BundleError


class Conditioner:
    """Computes the backbone's modulation, or takes it from the bundle's baked table if it has the step count.

    The results for the most recent inputs are cached.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._table = _load_table(bundle)
        self._cache = ModulationCache()

    def baked(self, steps: int) -> np.ndarray | None:
        """The baked modulation [S, M] float32 for this number of steps, or None if the conditioner must run."""
        return self._table.get(steps)

    def modulation(
        self, parts: Parts, timesteps: np.ndarray, guidance: np.float32 | None, pooled: np.ndarray | None
    ) -> np.ndarray:
        """The modulation of all steps, from the table, from the cache, or in one run of the conditioner.

        Args:
            parts: the bundle's parts.
            timesteps: [S] float32, the input of the timestep embedding.
            guidance: the input of the guidance embedding, or None for a student without one.
            pooled: [U, Dp] pooled text of U distinct prompts (FLUX), or None.

        Returns:
            [S, U, M], or [S, 1, M] if it does not depend on the prompt; float32 or the part's dtype.

        Raises:
            EngineError: the conditioner failed.
        """
        if (baked := self._table.get(len(timesteps))) is not None:
            return baked[:, None]
        inputs = {"timesteps": timesteps}
        if pooled is not None:
            inputs["pooled_projections"] = pooled
        if guidance is not None:
            inputs["guidance"] = np.full(1 if pooled is None else len(pooled), guidance, np.float32)
        if (cached := self._cache.get(inputs)) is not None:
            return cached
        with parts.use("conditioner") as run:
            modulation = run(inputs)["modulation"]
        self._cache.put(inputs, modulation)
        return modulation

    def clear_cache(self) -> None:
        """Drop the cached results."""
        self._cache.clear()


def _load_table(bundle: Bundle) -> dict[int, np.ndarray]:
    """Step count n -> its baked modulation [n, M] float32; empty if the bundle has none.

    Raises:
        BundleError: the table cannot be read, or its size or dtype differs from the backbone's input `modulation`.
    """
    spec = bundle.manifest.modulation
    if spec is None:
        return {}
    path = bundle.path(spec.file)
    inputs = bundle.manifest.parts["backbone"].inputs
    width = next((s.shape[-1] for s in inputs if s.name == "modulation"), None)
    try:
        with safe_open(str(path), "numpy") as f:
            table = {n: f.get_tensor(f"num_inference_steps_{n}") for n in spec.num_inference_steps}
    except SafetensorError as e:
        raise BundleError(f"{path}: the modulation table cannot be read ({e}); export the bundle again") from None
    for n, tensor in table.items():
        if tensor.shape != (n, width) or tensor.dtype != np.float32:
            raise BundleError(
                f"{path}: num_inference_steps_{n} must be float32 of shape [{n}, {width}], for the backbone's input "
                f"modulation, got {tensor.dtype}{list(tensor.shape)}; export the bundle again"
            )
    return table
