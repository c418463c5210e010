"""Render scenes with one known flaw: scenes -> images [B, 3, 64, 64] in [0, 1]. They train and test the judge."""

from __future__ import annotations

import math

import torch

from arcflow_export.images.scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RESOLUTION,
    SHIFT,
    SIZES,
    STRETCH,
    WIDE,
    Scenes,
    render,
    sample,
)

#: The flaws, by the names that reports use. In those of `READABLE` the attributes can still be read.
FLAWS = ("double", "two", "blur", "color", "background", "erased", "noise", "morph", "fused")
READABLE = ("blur", "noise")
#: A mixture of two palette colours counts as a flaw only if it is farther than this (Euclidean, sRGB in [0, 1]) from
#: every palette colour.
_OFF_PALETTE = 0.08


def clean_images(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """Render scenes with an autoencoder's small errors, which still count as clean: [B, 3, 64, 64] in [0, 1]."""
    coverage, color, background = _layers(scenes)
    return _finish(_paint(coverage, color, background), generator)


def flawed_images(scenes: Scenes, flaw: str, generator: torch.Generator) -> torch.Tensor:
    """Render scenes with the flaw named `flaw`, one of `FLAWS`: [B, 3, 64, 64] in [0, 1]."""
    return _finish(_FLAWED[flaw](scenes, generator), generator)


# An image is composed of coverage [B, 1, 64, 64], color and background [B, 3, 1, 1].


def _layers(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render scenes, and split the images into coverage, color and background, as defined above."""
    color = _color(COLORS, scenes.attributes["color"])
    background = _color(BACKGROUNDS, scenes.attributes["background"])
    contrast = color - background
    coverage = ((render(scenes) - background) * contrast).sum(1, keepdim=True) / contrast.square().sum(1, keepdim=True)
    return coverage, color, background


def _paint(coverage: torch.Tensor, color: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
    return under + coverage * (color - under)


def _finish(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add a blur of sigma up to 0.5 pixels, a colour shift of up to 0.02 per channel and noise of std up to 0.02."""
    count = len(images)
    images = _blur(images, _uniform(count, 0.0, 0.5, generator))
    images = images + (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.04
    std = _uniform(count, 0.0, 0.02, generator)
    return (images + std * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur, sigma [B, 1, 1, 1] in pixels: a row-stochastic matrix from each side."""
    i = torch.arange(images.shape[-1])
    squared = (i[:, None] - i[None, :]).square()
    matrix = torch.softmax(-squared / (2 * sigma.clamp(min=0.05).square()), dim=-1)  # [B, 1, 64, 64]
    return matrix @ images @ matrix.mT


# One function per flaw: (scenes, generator) -> images [B, 3, 64, 64].


def _double(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """A double exposure of two scenes; in half of the cases they differ in one attribute only."""
    other = sample(len(scenes), generator, held_out=None, jitter=WIDE)
    attributes = _other_words(scenes, ("shape", "color", "size", "position", "background"), generator)
    near = _place(attributes, generator)
    alpha = _uniform(len(scenes), 0.25, 0.75, generator)
    half = torch.rand(len(scenes), 1, 1, 1, generator=generator) < 0.5
    return torch.lerp(render(scenes), torch.where(half, render(near), render(other)), alpha)


def _two(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """A second, small object at another position."""
    moved = _other_words(scenes, ("position",), generator)
    changed = sample(len(scenes), generator, held_out=None).attributes
    attributes = moved | {"shape": changed["shape"], "color": changed["color"], "size": torch.zeros_like(moved["size"])}
    coverage, color, _ = _layers(_place(attributes, generator))
    return _paint(coverage, color, render(scenes))


def _blurred(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    return _blur(render(scenes), _uniform(len(scenes), 1.5, 3.5, generator))


def _mixed_color(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    coverage, _, background = _layers(scenes)
    return _paint(coverage, _draw(_mixtures(COLORS), len(scenes), generator), background)


def _mixed_background(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    coverage, color, _ = _layers(scenes)
    return _paint(coverage, color, _draw(_mixtures(BACKGROUNDS), len(scenes), generator))


def _erased(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """A half of the object, or a round bite, is missing."""
    count, radius = len(scenes), scenes.radius.view(-1, 1, 1, 1)
    along, across = _turned(scenes, generator)
    half = along - _uniform(count, -0.3, 0.3, generator) * radius
    bite = _uniform(count, 0.4, 0.6, generator) * radius
    disc = torch.hypot(along - _uniform(count, 0, 0.45, generator) * radius, across) - bite
    distance = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, half, disc)
    coverage, color, background = _layers(scenes)
    return _paint(coverage * (0.5 + distance * RESOLUTION).clamp(0, 1), color, background)


def _noisy(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    images = render(scenes)
    return images + _uniform(len(scenes), 0.06, 0.25, generator) * torch.randn(images.shape, generator=generator)


def _morphed(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """The coverages of two shapes mixed at the same place."""
    coverage, color, background = _layers(scenes)
    share = _uniform(len(scenes), 0.3, 0.7, generator)
    return _paint(torch.lerp(coverage, _other_shape(scenes, generator), share), color, background)


def _fused(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """One side of a shape and the other side of another, joined sharply through the centre."""
    coverage, color, background = _layers(scenes)
    along, _ = _turned(scenes, generator)
    side = (0.5 + along * RESOLUTION).clamp(0, 1)
    return _paint(torch.lerp(coverage, _other_shape(scenes, generator), side), color, background)


def _other_shape(scenes: Scenes, generator: torch.Generator) -> torch.Tensor:
    """Coverage of another shape of the same size at the same place."""
    attributes = _other_words(scenes, ("shape",), generator)
    return _layers(Scenes(attributes, scenes.center, scenes.radius))[0]


_FLAWED = {
    "double": _double,
    "two": _two,
    "blur": _blurred,
    "color": _mixed_color,
    "background": _mixed_background,
    "erased": _erased,
    "noise": _noisy,
    "morph": _morphed,
    "fused": _fused,
}


def _turned(scenes: Scenes, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel coordinates relative to the centre, along a random direction and across it: [B, 1, 64, 64] each."""
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION
    x = axis.view(1, 1, 1, -1) - scenes.center[:, 0].view(-1, 1, 1, 1)
    y = axis.view(1, 1, -1, 1) - scenes.center[:, 1].view(-1, 1, 1, 1)
    angle = _uniform(len(scenes), 0, 2 * math.pi, generator)
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _other_words(scenes: Scenes, names: tuple[str, ...], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The scenes' attributes, with one attribute of `names` (random per scene) changed to another word."""
    which = torch.randint(len(names), (len(scenes),), generator=generator)
    attributes = dict(scenes.attributes)
    for i, name in enumerate(names):
        words = len(ATTRIBUTES[name])
        step = torch.randint(1, words, (len(scenes),), generator=generator)
        attributes[name] = torch.where(which == i, (attributes[name] + step) % words, attributes[name])
    return attributes


def _place(attributes: dict[str, torch.Tensor], generator: torch.Generator) -> Scenes:
    """Scenes with these attributes and new jitter, distributed as in `sample`."""
    jitter = torch.rand(len(attributes["size"]), 3, generator=generator) * 2 - 1
    center = torch.tensor(list(POSITIONS.values()))[attributes["position"]] + WIDE * SHIFT * jitter[:, :2]
    radius = torch.tensor(list(SIZES.values()))[attributes["size"]] * (1 + WIDE * STRETCH * jitter[:, 2])
    return Scenes(attributes, center, radius)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)


def _color(palette: dict[str, tuple[int, int, int]], index: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(palette.values()))[index][:, :, None, None] / 255


def _mixtures(palette: dict[str, tuple[int, int, int]]) -> torch.Tensor:
    """Every mixture of two palette colours, 0.3 to 0.7 of each, that is not close to a palette colour: [M, 3]."""
    colors = torch.tensor(list(palette.values())) / 255
    i, j = torch.triu_indices(len(colors), len(colors), 1)
    mixed = torch.cat([torch.lerp(colors[i], colors[j], t) for t in torch.linspace(0.3, 0.7, 9).tolist()])
    return mixed[torch.cdist(mixed, colors).amin(1) > _OFF_PALETTE]


def _draw(colors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return colors[torch.randint(len(colors), (count,), generator=generator)][:, :, None, None]
