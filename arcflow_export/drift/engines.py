"""Generate images and latents with a bundle's engines, for the end-to-end part of the drift gate (`--backend`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.generate.pipeline import Pipeline


class Engines:
    """Runs the candidate in the runtime's pipeline, one image at a time."""

    def __init__(self, bundle: Bundle, backend: str, scene: ImageSettings) -> None:
        """Open the engines.

        Args:
            bundle: the candidate.
            backend: a key of `arcflow_runtime.backends.BACKENDS`.
            scene: image size, steps, guidance and text length for all cases.

        Raises:
            EngineError: the backend cannot run the bundle here; for example, there is no GPU or no engine.
        """
        self._pipeline = Pipeline.load(bundle.root, backend=backend)
        self._scene = scene

    def generate(self, cases: Sequence[DriftCase]) -> tuple[list[np.ndarray], np.ndarray]:
        """Generate the cases: latents [n, N, C] float32 after every step, and images [n, H, W, 3] uint8."""
        s, rows = self._scene, []
        images = []
        guided: dict[str, Any] = {}
        if s.negative_prompt is not None:
            guided = {"negative_prompt": s.negative_prompt, "true_cfg_scale": s.true_cfg_scale}
        for case in cases:
            steps: list[np.ndarray] = []
            out = self._pipeline(
                case.prompt,
                s.height_px,
                s.width_px,
                s.num_inference_steps,
                s.guidance_scale,
                case.seed,
                max_sequence_length=s.max_sequence_length,
                callback_on_step_end=partial(_keep, steps),
                **guided,
            )
            rows.append(steps)
            images.append(np.asarray(out.images[0]))
        return [np.concatenate(step) for step in zip(*rows, strict=True)], np.stack(images)

    def close(self) -> None:
        """Free the engines."""
        self._pipeline.close()


def _keep(steps: list[np.ndarray], _: int, latents: np.ndarray) -> None:
    steps.append(latents.copy())
