"""Encode prompts: token ids [1, T] -> text states [1, T, Dt] and, for FLUX, pooled vectors [1, Dp]."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.generate.text import Tokens


def encode_prompts(parts: Parts, manifest: Manifest, prompts: Mapping[str, Tokens]) -> dict[str, Embeddings]:
    """Run the text encoders on each prompt separately, so that its states never depend on the other prompts.

    Args:
        parts: the bundle's parts; each encoder is loaded once for all prompts.
        manifest: gives the family and the number of leading states to drop.
        prompts: the distinct prompts and their ids.

    Returns:
        Prompt -> its embeddings.

    Raises:
        EngineError: an encoder failed.
    """
    if manifest.family == "flux":
        pooled = _run(parts, "text_encoder", "pooled_projections", prompts)
        states = _run(parts, "text_encoder_2", "encoder_hidden_states", prompts)
        return {p: Embeddings(states[p], pooled[p], t.warnings) for p, t in prompts.items()}
    states = _run(parts, "text_encoder", "encoder_hidden_states", prompts)
    drop = manifest.text.drop_tokens
    return {p: Embeddings(_frozen(states[p][:, drop:].copy()), None, t.warnings) for p, t in prompts.items()}


def _run(parts: Parts, part: str, output: str, prompts: Mapping[str, Tokens]) -> dict[str, np.ndarray]:
    if not prompts:
        return {}
    with parts.use_all(part) as run_all:
        found = run_all([{"input_ids": tokens.ids[part]} for tokens in prompts.values()])
        return {p: _frozen(outputs[output]) for p, outputs in zip(prompts, found, strict=True)}


def _frozen(array: np.ndarray) -> np.ndarray:
    # Read-only, because embeddings are cached and shared between calls and threads.
    array.setflags(write=False)
    return array
