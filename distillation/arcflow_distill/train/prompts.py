"""Prompts -> the text that the networks are given, encoded once by the base checkpoint's own encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arcflow_distill.errors import DistillError
from arcflow_distill.train.config import Config
from arcflow_export.families import facts

_BATCH = 32
#: Draws of the caption generator are the same for every seed of the distillation.
_CAPTION_SEED = 0


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt: states [T, D] of its valid tokens, and FLUX's pooled vector [P]."""

    states: torch.Tensor
    pooled: torch.Tensor | None

    def to(self, device: torch.device) -> Prompt:
        """The same on a device."""
        return Prompt(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


@dataclass(frozen=True)
class Text:
    """A batch: states [B, T, D], mask [B, T] bool where lengths differ, and FLUX's pooled vectors [B, P]."""

    states: torch.Tensor
    mask: torch.Tensor | None
    pooled: torch.Tensor | None


def read_prompts(config: Config) -> list[str]:
    """The prompts that a configuration names, repetitions included.

    Raises:
        DistillError: none are named, or the file is missing, empty or not UTF-8.
    """
    if config.prompts is None:
        raise DistillError("no prompts: give --prompts FILE with one prompt per line")
    if config.prompts == "shapes":
        return _captions(config.prompt_count)
    path = Path(config.prompts)
    if not path.is_file():
        raise DistillError(f"prompts: {path} is no file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DistillError(f"prompts: {path} is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DistillError(f"prompts: {path} is empty; write one prompt per line")
    return prompts


def _captions(count: int) -> list[str]:
    from arcflow_export.images import scenes

    generator = torch.Generator().manual_seed(_CAPTION_SEED)
    drawn = scenes.sample(count, generator)
    variants = torch.randint(2, (count,), generator=generator).tolist()
    return [scenes.caption(scenes.name_some(drawn.words(i), generator), variant) for i, variant in enumerate(variants)]


class Encoder:
    """The text encoders of a base checkpoint, run through diffusers' own pipeline."""

    def __init__(self, base: Path, family: str, dtype: torch.dtype, device: torch.device, max_sequence_length: int):
        import diffusers

        pipeline: Any = getattr(diffusers, facts(family).pipeline)
        # Without the networks that do not see the prompt; nothing but safetensors is ever read.
        self._pipe = pipeline.from_pretrained(base, transformer=None, vae=None, dtype=dtype, use_safetensors=True)
        self._pipe.to(device)
        self._length = max_sequence_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Encode prompts in small batches."""
        encoded: list[Prompt] = []
        for start in range(0, len(prompts), _BATCH):
            encoded += self._encode(list(prompts[start : start + _BATCH]))
        return encoded

    def _encode(self, prompts: list[str]) -> list[Prompt]:
        device = self._pipe.text_encoder.device
        result = self._pipe.encode_prompt(prompts, device=device, max_sequence_length=self._length)
        return self._split(*result)

    def _split(
        self, states: torch.Tensor, second: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> list[Prompt]:
        """FLUX gives states, pooled vectors and position ids, Qwen-Image states and a mask of its valid tokens."""
        if ids is not None:
            assert second is not None
            return [Prompt(s, p) for s, p in zip(states, second, strict=True)]
        if second is None:
            return [Prompt(s, None) for s in states]
        return [Prompt(s[m.bool()], None) for s, m in zip(states, second, strict=True)]


def collate(prompts: Sequence[Prompt]) -> Text:
    """Put prompts into one batch, padded to the longest and masked where they differ in length."""
    lengths = [len(p.states) for p in prompts]
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    stacked = torch.stack(pooled) if pooled else None
    if min(lengths) == max(lengths):
        return Text(torch.stack([p.states for p in prompts]), None, stacked)
    states = torch.nn.utils.rnn.pad_sequence([p.states for p in prompts], batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Text(states, mask.to(states.device), stacked)


class TextSource:
    """Draws batches of encoded prompts; a set small enough is encoded beforehand and its encoders let go."""

    def __init__(self, prompts: Sequence[str], encoder: Encoder, cached: int, device: torch.device):
        self._prompts, self._device = prompts, device
        unique = list(dict.fromkeys(prompts))
        self._encoder: Encoder | None = None
        self._known: dict[str, Prompt] = {}
        if len(unique) <= cached:
            # On the host: even a few hundred prompts of FLUX are gigabytes.
            kept = [
                Prompt(p.states.cpu(), None if p.pooled is None else p.pooled.cpu()) for p in encoder.encode(unique)
            ]
            self._known = dict(zip(unique, kept, strict=True))
        else:
            self._encoder = encoder
        self.negative = encoder.encode([""])[0]

    @property
    def count(self) -> int:
        """How many prompts there are, repetitions included."""
        return len(self._prompts)

    @property
    def cached(self) -> bool:
        """Whether all prompts were encoded beforehand."""
        return self._encoder is None

    def draw(self, count: int, generator: torch.Generator) -> list[Prompt]:
        """Draw prompts with replacement; `generator` is a CPU generator."""
        chosen = [self._prompts[i] for i in torch.randint(len(self._prompts), (count,), generator=generator).tolist()]
        if self._encoder is not None:
            return self._encoder.encode(chosen)
        return [self._known[p].to(self._device) for p in chosen]
