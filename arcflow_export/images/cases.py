"""The prompts of an evaluation, and real images for them: count and seed -> captions, named words, renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from arcflow_export.images.scenes import ATTRIBUTES, Scenes, caption, name_some, render, sample

#: The groups that are scored separately: pairs of shape and colour seen in training, and pairs never seen.
GROUPS = ("seen", "held-out")
#: The name for both groups together.
ALL = "all"
#: Scenes sampled at a time when looking for one that fits a caption; the rarest caption fits one scene in 1,200.
_POOL = 16384


@dataclass(frozen=True)
class Cases:
    """Prompts, as tuples of equal length: named words, caption, group, and seed of the noise of each."""

    words: tuple[dict[str, str], ...]
    captions: tuple[str, ...]
    groups: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.words)

    def rows(self, group: str) -> list[int]:
        """The indices of a group's prompts, or of all prompts for `ALL`."""
        return [i for i, g in enumerate(self.groups) if group in (g, ALL)]


def draw_cases(count: int, seed: int) -> Cases:
    """Make captions of random scenes, each naming a random subset of the attributes.

    The last count // 2 have held-out pairs of shape and colour, and always name both.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = count // 2
    seen = sample(count - held_out, generator)
    unseen = sample(held_out, generator, held_out=True)
    words = [name_some(seen.words(i), generator) for i in range(len(seen))]
    for i in range(held_out):
        full = unseen.words(i)
        words.append({name: full[name] for name in ("shape", "color")} | name_some(full, generator))
    variants = torch.randint(2, (count,), generator=generator).tolist()
    captions = tuple(caption(w, variant) for w, variant in zip(words, variants, strict=True))
    groups = (GROUPS[0],) * len(seen) + (GROUPS[1],) * held_out
    return Cases(tuple(words), captions, groups, tuple(range(seed, seed + count)))


def real_images(cases: Cases, seed: int) -> torch.Tensor:
    """Render a scene for each caption; unnamed attributes are random: [B, 3, 64, 64] in [0, 1].

    Scenes for a seen prompt have only pairs of shape and colour that training used; those for a held-out prompt have
    only held-out pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = {group: sample(_POOL, generator, held_out=group == GROUPS[1]) for group in GROUPS}
    picked = []
    for words, group in zip(cases.words, cases.groups, strict=True):
        while not len(rows := _described(pools[group], words)):
            pools[group] = sample(_POOL, generator, held_out=group == GROUPS[1])
        picked.append((pools[group], int(rows[torch.randint(len(rows), (1,), generator=generator)])))
    return render(_gather(picked))


def _described(scenes: Scenes, words: dict[str, str]) -> torch.Tensor:
    """The indices of the scenes that have every word, int64."""
    fits = torch.ones(len(scenes), dtype=torch.bool)
    for name, word in words.items():
        fits &= scenes.attributes[name] == ATTRIBUTES[name].index(word)
    return fits.nonzero()[:, 0]


def _gather(picked: Sequence[tuple[Scenes, int]]) -> Scenes:
    return Scenes(
        {name: torch.stack([scenes.attributes[name][i] for scenes, i in picked]) for name in ATTRIBUTES},
        torch.stack([scenes.center[i] for scenes, i in picked]),
        torch.stack([scenes.radius[i] for scenes, i in picked]),
    )
