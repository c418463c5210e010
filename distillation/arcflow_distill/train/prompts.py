"""Read prompts and encode them with the base checkpoint's text encoders -> batches of text for the networks."""

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
#: Seed of the captions of shapes; they are the same for every seed of the distillation.
_CAPTION_SEED = 0


@dataclass(frozen=True)
class EncodedPrompt:
    """One encoded prompt: text states [T, D] of its valid tokens, and for FLUX the pooled vector [P]."""

    states: torch.Tensor
    pooled: torch.Tensor | None

    def to(self, device: torch.device) -> EncodedPrompt:
        """The same prompt on a device."""
        return EncodedPrompt(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


@dataclass(frozen=True)
class TextBatch:
    """A batch of prompts: states [B, T, D], mask [B, T] bool if lengths differ, and FLUX's pooled vectors [B, P]."""

    states: torch.Tensor
    mask: torch.Tensor | None
    pooled: torch.Tensor | None


def read_prompts(config: Config) -> list[str]:
    """Read the prompts that a configuration names; repeated prompts are kept.

    Raises:
        DistillError: the configuration names no prompts, or the file is missing, empty or not UTF-8.
    """
    if config.prompts is None:
        raise DistillError("no prompts: give --prompts FILE with one prompt per line")
    if config.prompts == "shapes":
        return _captions(config.prompt_count)
    path = Path(config.prompts)
    if not path.is_file():
        raise DistillError(f"prompts: {path} is not a file; give a text file with one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DistillError(f"prompts: {path} is not UTF-8 text; save it as UTF-8") from None
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
        # The transformer and the VAE do not see the prompt, so they are not loaded. Only safetensors files are read.
        self._pipe = pipeline.from_pretrained(base, transformer=None, vae=None, dtype=dtype, use_safetensors=True)
        self._pipe.to(device)
        self._length = max_sequence_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode prompts in small batches."""
        encoded: list[EncodedPrompt] = []
        for start in range(0, len(prompts), _BATCH):
            encoded += self._encode(list(prompts[start : start + _BATCH]))
        return encoded

    def _encode(self, prompts: list[str]) -> list[EncodedPrompt]:
        device = self._pipe.text_encoder.device
        result = self._pipe.encode_prompt(prompts, device=device, max_sequence_length=self._length)
        return self._split(*result)

    def _split(
        self, states: torch.Tensor, second: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> list[EncodedPrompt]:
        """Split a batch into prompts.

        FLUX returns states, pooled vectors and position ids; Qwen-Image returns states and a mask of valid tokens.
        """
        if ids is not None:
            assert second is not None
            return [EncodedPrompt(s, p) for s, p in zip(states, second, strict=True)]
        if second is None:
            return [EncodedPrompt(s, None) for s in states]
        return [EncodedPrompt(s[m.bool()], None) for s, m in zip(states, second, strict=True)]


def collate(prompts: Sequence[EncodedPrompt]) -> TextBatch:
    """Put prompts into one batch; if their lengths differ, pad them to the longest and add a mask."""
    lengths = [len(p.states) for p in prompts]
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    stacked = torch.stack(pooled) if pooled else None
    if min(lengths) == max(lengths):
        return TextBatch(torch.stack([p.states for p in prompts]), None, stacked)
    states = torch.nn.utils.rnn.pad_sequence([p.states for p in prompts], batch_first=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextBatch(states, mask.to(states.device), stacked)


class TextSource:
    """Gives random encoded prompts. A small set is encoded once, and the encoders are freed."""

    def __init__(self, prompts: Sequence[str], encoder: Encoder, cached: int, device: torch.device):
        self._prompts, self._device = prompts, device
        unique = list(dict.fromkeys(prompts))
        self._encoder: Encoder | None = None
        self._known: dict[str, EncodedPrompt] = {}
        if len(unique) <= cached:
            # Kept on the host, because even a few hundred encoded prompts of FLUX take gigabytes.
            kept = [
                EncodedPrompt(p.states.cpu(), None if p.pooled is None else p.pooled.cpu())
                for p in encoder.encode(unique)
            ]
            self._known = dict(zip(unique, kept, strict=True))
        else:
            self._encoder = encoder
        self.negative = encoder.encode([""])[0]

    @property
    def count(self) -> int:
        """The number of prompts, repetitions included."""
        return len(self._prompts)

    @property
    def cached(self) -> bool:
        """True if all prompts were encoded before training."""
        return self._encoder is None

    def draw(self, count: int, generator: torch.Generator) -> list[EncodedPrompt]:
        """Draw prompts with replacement; `generator` is a CPU generator."""
        chosen = [self._prompts[i] for i in torch.randint(len(self._prompts), (count,), generator=generator).tolist()]
        if self._encoder is not None:
            return self._encoder.encode(chosen)
        return [self._known[p].to(self._device) for p in chosen]
