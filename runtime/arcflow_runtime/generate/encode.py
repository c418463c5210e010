"""Encode prompts: token ids [1, T] -> text states [1, T, Dt] and, for FLUX, pooled vectors [1, Dp]."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.signatures import encoder_of
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.generate.text import Tokens
from arcflow_runtime.lora.prepare import NO_LORAS, PreparedLoras


def encode_prompts(
    parts: Parts, manifest: Manifest, prompts: Mapping[str, Tokens], loras: PreparedLoras = NO_LORAS
) -> dict[str, Embeddings]:
    """Run the text encoders on each prompt separately, so that its states never depend on the other prompts.

    Args:
        parts: the bundle's parts; each encoder is loaded once for all prompts.
        manifest: gives the family and the number of leading states to drop.
        prompts: the distinct prompts and their ids.
        loras: the LoRAs of the request.

    Returns:
        Prompt -> its embeddings.

    Raises:
        EngineError: an encoder failed.
    """
    pooled = _run(parts, manifest, "pooled_projections", prompts, loras)
    states = _run(parts, manifest, "encoder_hidden_states", prompts, loras)
    if drop := manifest.text.drop_tokens:
        states = {p: _frozen(s[:, drop:].copy()) for p, s in states.items()}
    return {p: Embeddings(states[p], pooled.get(p), t.warnings) for p, t in prompts.items()}


def _run(
    parts: Parts, manifest: Manifest, output: str, prompts: Mapping[str, Tokens], loras: PreparedLoras
) -> dict[str, np.ndarray]:
    """One output of the text encoders, by prompt; empty if no encoder of the family has this output."""
    part = encoder_of(manifest.family, output)
    if part is None or not prompts:
        return {}
    with parts.use_all(part) as run_all:
        found = run_all([{"input_ids": tokens.ids[part], **loras.of(part)} for tokens in prompts.values()])
        return {p: _frozen(outputs[output]) for p, outputs in zip(prompts, found, strict=True)}


def _frozen(array: np.ndarray) -> np.ndarray:
    # Read-only, because embeddings are cached and shared between calls and threads.
    array.setflags(write=False)
    return array
