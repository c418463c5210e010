"""Compute the modulation: timesteps [S], guidance and pooled text [U, Dp] -> [S, U, M] or [S, 1, M].

The modulation holds the AdaLN parameters of all blocks, which depend on these inputs only and not on the image.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from safetensors import SafetensorError, safe_open

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import MODULATION, lora_a, lora_b
from arcflow_runtime.engines.modulation import ModulationCache
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import BundleError
from arcflow_runtime.lora.prepare import NO_LORAS, PreparedLoras, SetKey

#: Tables changed by LoRAs that are kept; one of Qwen-Image takes 18 MB for two steps.
CHANGED_TABLES = 8


class Conditioner:
    """Computes the backbone's modulation, or takes it from the bundle's baked table if it has the step count.

    The results for the most recent inputs are cached.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._spec = bundle.manifest.modulation
        self._table = _load_table(bundle)
        self._cache = ModulationCache()
        self._conditioning = _load_conditioning(bundle)
        self._changed: OrderedDict[tuple[SetKey, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def baked(self, steps: int, loras: PreparedLoras = NO_LORAS) -> np.ndarray | None:
        """The baked modulation [S, M] float32 for this number of steps, or None if the conditioner must run.

        LoRAs that change the table's layers are added to a copy; the most recent copies are kept.
        """
        table = self._table.get(steps)
        if table is None or loras.of("conditioner"):
            return None
        if not loras.of(MODULATION):
            return table
        with self._lock:
            if (loras.key, steps) not in self._changed:
                self._changed[loras.key, steps] = self._change(table, self._conditioning[steps], loras)
            self._changed.move_to_end((loras.key, steps))
            while len(self._changed) > CHANGED_TABLES:
                self._changed.popitem(last=False)
            return self._changed[loras.key, steps]

    def _change(self, table: np.ndarray, conditioning: np.ndarray, loras: PreparedLoras) -> np.ndarray:
        """The table [S, M] plus (silu(temb) A) B of each layer, in that layer's columns (B14)."""
        assert self._spec is not None and self._spec.columns is not None, "Bundle.open checks this"
        changed, inputs = table.copy(), loras.of(MODULATION)
        for layer, rank in loras.ranks[MODULATION].items():
            a, b = inputs[lora_a(layer)], inputs[lora_b(layer)]
            product = (conditioning @ a.reshape(-1, rank)) @ b.reshape(rank, -1)
            start = self._spec.columns[layer]
            changed[:, start : start + product.shape[1]] += product
        changed.setflags(write=False)
        return changed

    def modulation(
        self,
        parts: Parts,
        timesteps: np.ndarray,
        guidance: np.float32 | None,
        pooled: np.ndarray | None,
        loras: PreparedLoras = NO_LORAS,
    ) -> np.ndarray:
        """The modulation of all steps, from the table, from the cache, or in one run of the conditioner.

        Args:
            parts: the bundle's parts.
            timesteps: [S] float32, the input of the timestep embedding.
            guidance: the input of the guidance embedding, or None for a student without one.
            pooled: [U, Dp] pooled text of U distinct prompts (FLUX), or None.
            loras: the LoRAs of the request.

        Returns:
            [S, U, M], or [S, 1, M] if it does not depend on the prompt; float32 or the part's dtype.

        Raises:
            EngineError: the conditioner failed.
        """
        if (baked := self.baked(len(timesteps), loras)) is not None:
            return baked[:, None]
        inputs = conditioner_inputs(timesteps, guidance, pooled)
        slots = loras.of("conditioner")
        key = loras.key if slots else None
        if (cached := self._cache.get(inputs, key)) is not None:
            return cached
        with parts.use("conditioner") as run:
            modulation = run({**inputs, **slots})["modulation"]
        self._cache.put(inputs, modulation, key)
        return modulation

    def clear_cache(self) -> None:
        """Drop the cached results."""
        self._cache.clear()


def conditioner_inputs(
    timesteps: np.ndarray, guidance: np.float32 | None, pooled: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The inputs of the part `conditioner` (B9), without those of LoRA slots; see `Conditioner.modulation`."""
    inputs = {"timesteps": timesteps}
    if pooled is not None:
        inputs["pooled_projections"] = pooled
    if guidance is not None:
        inputs["guidance"] = np.full(1 if pooled is None else len(pooled), guidance, np.float32)
    return inputs


def _load_table(bundle: Bundle) -> dict[int, np.ndarray]:
    """Step count n -> its baked modulation [n, M] float32; empty if the bundle has none.

    Raises:
        BundleError: the table cannot be read, or its size or dtype differs from the backbone's input `modulation`.
    """
    inputs = bundle.manifest.parts["backbone"].inputs
    width = next((s.shape[-1] for s in inputs if s.name == "modulation"), None)
    return _load(bundle, "num_inference_steps", width, "for the backbone's input modulation")


def _load_conditioning(bundle: Bundle) -> dict[int, np.ndarray]:
    """Step count n -> the input [n, D] float32 of the layers of a table with slots; empty without slots.

    Raises:
        BundleError: the inputs cannot be read, or their size or dtype differs from the slots'.
    """
    spec = bundle.manifest.modulation
    if spec is None or spec.lora is None:
        return {}
    found = {}
    for width in {layer.in_features for layer in spec.lora.layers.values()}:
        found = _load(bundle, "conditioning", width, "for the table's slots")
    return found


def _load(bundle: Bundle, name: str, width: int | str | None, what: str) -> dict[int, np.ndarray]:
    """Step count n -> the tensor `<name>_<n>` [n, width] float32 of the table's file."""
    spec = bundle.manifest.modulation
    if spec is None:
        return {}
    path = bundle.path(spec.file)
    try:
        with safe_open(str(path), "numpy") as f:
            table = {n: f.get_tensor(f"{name}_{n}") for n in spec.num_inference_steps}
    except SafetensorError as e:
        raise BundleError(f"{path}: the modulation table cannot be read ({e}); export the bundle again") from None
    for n, tensor in table.items():
        if tensor.shape != (n, width) or tensor.dtype != np.float32:
            raise BundleError(
                f"{path}: {name}_{n} must be float32 of shape [{n}, {width}], {what}, "
                f"got {tensor.dtype}{list(tensor.shape)}; export the bundle again"
            )
    return table
