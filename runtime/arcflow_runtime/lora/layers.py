"""What a LoRA file holds, after reading: factors and scale of every linear that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one linear: W' = W + scale * up @ down.

    Args:
        component: the checkpoint's folder: "transformer", "text_encoder" or "text_encoder_2".
        down: A [r, in] float32, read-only; the linears of a fused one may share it.
        up: B [out, r] float32, read-only.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA; 1 if the file says nothing.
        source: where the scale comes from, such as "alpha 8 (its own tensor) / 4".
        key: the module as the file calls it.
        alpha: None if the file states none.
        file_rank: the rank in the file, which the scale is computed with. `rank` can be smaller: of a fused linear's
            factors, a split linear keeps the columns that are not zero.
    """

    component: str
    down: np.ndarray
    up: np.ndarray
    scale: float
    source: str
    key: str
    alpha: float | None
    file_rank: int

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return int(self.down.shape[0])

    @property
    def in_features(self) -> int:
        """Inputs of the linear."""
        return int(self.down.shape[1])

    @property
    def out_features(self) -> int:
        """Outputs of the linear."""
        return int(self.up.shape[0])


@dataclass(frozen=True)
class Skipped:
    """A tensor, or a module with all its tensors, that is not used, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True)
class LoraFile:
    """One LoRA file: its layers by part and linear, sorted, and what is not used.

    `tensors` counts the tensors of the file. `config` is the adapter_config.json that was read with it, if any.
    """

    path: Path
    family: str
    layers: Mapping[tuple[str, str], LoraLayer]
    skipped: tuple[Skipped, ...]
    tensors: int
    config: Path | None = None

    def component(self, component: str) -> dict[str, LoraLayer]:
        """The layers of one component of the checkpoint, by linear."""
        return {name: layer for (_, name), layer in self.layers.items() if layer.component == component}
