"""The judge: a small classifier of shape images [B, 3, 64, 64] in [0, 1] -> attributes, clean or not, features.

It is trained on the renderer's own images, so that generated images can be scored without a person.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from arcflow_export.checkpoint.sources import read_json
from arcflow_export.errors import SourceError
from arcflow_export.images.flaws import FLAWS, READABLE, clean_images, flawed_images
from arcflow_export.images.scenes import ATTRIBUTES, BACKGROUNDS, COLORS, RESOLUTION, WIDE, Scenes, render, sample

FEATURES = 64
#: An image counts as clean above this probability.
CLEAN = 0.5
#: Training: optimiser steps, and the images of each flaw per step. Flaws that are hard to see come more often.
STEPS = 1200
_BATCH: dict[str | None, int] = {
    None: 56,
    "double": 10,
    "two": 10,
    "blur": 4,
    "color": 6,
    "background": 6,
    "erased": 10,
    "noise": 4,
    "morph": 14,
    "fused": 8,
}
#: Width of the Gaussian that measures likeness to a palette colour, in sRGB in [0, 1].
_SPREAD = 0.1
_CONFIG, _WEIGHTS, _CLASS = "config.json", "model.safetensors", "ShapesJudge"


@dataclass(frozen=True)
class Reading:
    """The judge's output for B images: attribute indices int64 [B], P(clean) float32 [B], features float32 [B, 64]."""

    attributes: dict[str, torch.Tensor]
    clean: torch.Tensor
    features: torch.Tensor

    def named(self, words: Sequence[Mapping[str, str]]) -> torch.Tensor:
        """For each image i, True if it shows every attribute named in words[i]: bool [B]."""
        seen = {name: index.tolist() for name, index in self.attributes.items()}
        rows = [all(ATTRIBUTES[a][seen[a][i]] == word for a, word in named.items()) for i, named in enumerate(words)]
        return torch.tensor(rows, dtype=torch.bool)

    def right(self, words: Sequence[Mapping[str, str]]) -> torch.Tensor:
        """For each image i, True if it shows every attribute named in words[i] and is clean: bool [B]."""
        return self.named(words) & (self.clean > CLEAN)


class Judge(nn.Module):
    """Convolutions over the colours and their likeness to the palette; a linear head per attribute and one for "clean".

    After training, the float32 weights hold bfloat16 values, so that saving them in bfloat16 loses nothing.
    """

    palette: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        palette = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()]) / 255
        self.register_buffer("palette", palette, persistent=False)
        widths = (3 + len(palette), 32, 48, 64, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(words)) for name, words in ATTRIBUTES.items()})
        self.clean = nn.Linear(FEATURES, 1)

    def forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Images [B, 3, 64, 64] -> logits [B, words] by attribute, logit of "clean" [B], features [B, 64]."""
        # The squared distance to each palette colour, expanded as |a|^2 - 2ab + |b|^2: [B, palette, 64, 64].
        products = functional.conv2d(images, self.palette[:, :, None, None])
        lengths = self.palette.square().sum(1)[:, None, None]
        likeness = torch.exp((2 * products - lengths - images.square().sum(1, keepdim=True)) / (2 * _SPREAD**2))
        features = self.trunk(torch.cat([2 * images - 1, likeness], 1))
        return {n: head(features) for n, head in self.heads.items()}, self.clean(features)[:, 0], features

    @torch.inference_mode()
    def read(self, images: torch.Tensor, batch: int = 256) -> Reading:
        """Judge float32 images [B, 3, 64, 64] in [0, 1], `batch` at a time."""
        parts = [self(rows) for rows in images.split(batch)]
        attributes = {n: torch.cat([logits[n] for logits, _, _ in parts]).argmax(1) for n in ATTRIBUTES}
        clean, features = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        return Reading(attributes, clean.sigmoid(), features)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (bfloat16) into `folder`; creates the folder if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.to(torch.bfloat16) for k, v in self.state_dict().items()}, folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps(_config(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Judge:
        """Read a judge that `save` wrote.

        Raises:
            SourceError: a file is missing or damaged, or the judge was trained for other attributes.
        """
        config = read_json(folder / _CONFIG, "judge")
        if config != _config():
            raise SourceError(
                f"judge: {folder / _CONFIG} must describe a {_CLASS} of this version's attributes; train it again"
            )
        judge = Judge()
        try:
            judge.load_state_dict({k: v.float() for k, v in load_file(folder / _WEIGHTS).items()})
        except (OSError, SafetensorError, RuntimeError) as e:
            reason = str(e).strip().splitlines()[0]
            raise SourceError(f"judge: {folder / _WEIGHTS} is missing or damaged ({reason}); train it again") from None
        return judge.eval()


def train_judge(seed: int = 0, progress: Callable[[float], None] | None = None, steps: int = STEPS) -> Judge:
    """Train a judge on the CPU, about four minutes on one core.

    Args:
        seed: seed of the weights and of every image; torch's global generator is not changed.
        progress: called after each step with the loss.
        steps: optimiser steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
    for _ in range(steps):
        images, scenes, clean, readable = _batch(generator)
        # Channels last is a third faster on a CPU.
        logits, clean_logit, _ = judge(images.contiguous(memory_format=torch.channels_last))
        loss = 2 * functional.binary_cross_entropy_with_logits(clean_logit, clean.float())
        for name, index in scenes.attributes.items():
            loss = loss + functional.cross_entropy(logits[name][readable], index[readable])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(float(loss.detach()))
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.copy_(parameter.bfloat16())
    return judge.eval()


def judge_rates(judge: Judge, count: int, seed: int) -> dict[str, float]:
    """Measure the judge's error rates on `count` new images of each kind.

    Returns:
        For each attribute, the share of plain renders that are read correctly; "false reject", the share of clean
        images that are called flawed; and for each flaw F "false accept: F", the share that is called clean.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = sample(count, generator, held_out=None)
    plain = judge.read(render(scenes))
    rates = {n: float((plain.attributes[n] == index).double().mean()) for n, index in scenes.attributes.items()}
    rates["false reject"] = float((judge.read(clean_images(scenes, generator)).clean <= CLEAN).double().mean())
    for flaw in FLAWS:
        accepted = judge.read(flawed_images(scenes, flaw, generator)).clean > CLEAN
        rates[f"false accept: {flaw}"] = float(accepted.double().mean())
    return rates


def _batch(generator: torch.Generator) -> tuple[torch.Tensor, Scenes, torch.Tensor, torch.Tensor]:
    """A training batch: images [B, 3, 64, 64], their scenes, clean or not and attributes readable or not, bool [B]."""
    flaws = [flaw for flaw, count in _BATCH.items() for _ in range(count)]
    scenes = sample(len(flaws), generator, held_out=None, jitter=WIDE)
    images = []
    for flaw, rows in zip(_BATCH, torch.arange(len(flaws)).split(list(_BATCH.values())), strict=True):
        part = _take(scenes, rows)
        images.append(flawed_images(part, flaw, generator) if flaw else clean_images(part, generator))
    clean = torch.tensor([flaw is None for flaw in flaws])
    readable = torch.tensor([flaw is None or flaw in READABLE for flaw in flaws])
    return torch.cat(images), scenes, clean, readable


def _take(scenes: Scenes, rows: torch.Tensor) -> Scenes:
    return Scenes({n: a[rows] for n, a in scenes.attributes.items()}, scenes.center[rows], scenes.radius[rows])


def _config() -> dict[str, object]:
    return {
        "_class_name": _CLASS,
        "format": 1,
        "resolution": RESOLUTION,
        "features": FEATURES,
        "attributes": {name: list(words) for name, words in ATTRIBUTES.items()},
    }


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
