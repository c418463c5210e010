"""Scenes of one shape on a plain background: sample them, write their captions, render them with smooth edges.

They are the training data of the shapes model and of its judge. A scene has five attributes. Its caption names a random
subset of them, so many images are right for one caption, and the starting noise decides which one is generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "heart")
COLORS = {
    "red": (214, 48, 49),
    "orange": (243, 134, 32),
    "yellow": (247, 205, 56),
    "green": (46, 158, 87),
    "blue": (38, 98, 214),
    "purple": (134, 68, 178),
}
BACKGROUNDS = {
    "white": (246, 245, 240),
    "black": (34, 36, 46),
    "blue": (176, 216, 242),
    "pink": (250, 196, 208),
}
#: Radius in units of the image's height.
SIZES = {"small": 0.14, "large": 0.25}
#: Centre (x, y) in units of the image's size, y down, and its phrase.
POSITIONS = {
    "left": (0.29, 0.5),
    "right": (0.71, 0.5),
    "top": (0.5, 0.29),
    "bottom": (0.5, 0.71),
    "center": (0.5, 0.5),
}
PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
#: Attribute -> its words; a scene stores indices into them.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
#: How often a caption names an attribute.
NAMED = {"shape": 0.95, "color": 0.8, "size": 0.75, "position": 0.6, "background": 0.75}
#: Pairs of shape and colour that never occur in training. Each shape and each colour is in exactly one pair.
HELD_OUT = (
    ("circle", "orange"),
    ("square", "purple"),
    ("triangle", "blue"),
    ("diamond", "red"),
    ("cross", "yellow"),
    ("heart", "green"),
)
#: The centre is shifted by up to SHIFT times the image's size, and the radius changed by up to STRETCH times itself,
#: both uniformly at random.
SHIFT, STRETCH = 0.005, 0.0125
#: The VAE and the judge are trained with shifts and changes this many times larger, because they must read images that
#: are slightly off.
WIDE = 4.0
RESOLUTION = 64
#: T5 tokens of a caption, end mark and padding included. FLUX masks no padding, so training and generation must use the
#: same number.
MAX_SEQUENCE_LENGTH = 12


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: attribute indices int64 [B] each, centre [B, 2] and radius [B] as fractions of the size."""

    attributes: dict[str, torch.Tensor]
    center: torch.Tensor
    radius: torch.Tensor

    def __len__(self) -> int:
        return len(self.radius)

    def words(self, i: int) -> dict[str, str]:
        """Scene i's attributes in words."""
        return {name: ATTRIBUTES[name][int(index[i])] for name, index in self.attributes.items()}


def sample(count: int, generator: torch.Generator, held_out: bool | None = False, jitter: float = 1.0) -> Scenes:
    """Sample random scenes, all attributes uniform.

    Args:
        count: number of scenes.
        generator: a CPU generator; the same state gives the same scenes.
        held_out: which pairs of shape and colour: False for those of training, True for `HELD_OUT`, None for all.
        jitter: factor for `SHIFT` and `STRETCH`.
    """
    kept = [(s, c) for s in SHAPES for c in COLORS if held_out is None or ((s, c) in HELD_OUT) == held_out]
    shapes = torch.tensor([SHAPES.index(s) for s, _ in kept])
    colors = torch.tensor([tuple(COLORS).index(c) for _, c in kept])
    pick = torch.randint(len(kept), (count,), generator=generator)
    attributes = {"shape": shapes[pick], "color": colors[pick]}
    for name in ("size", "position", "background"):
        attributes[name] = torch.randint(len(ATTRIBUTES[name]), (count,), generator=generator)
    shift = jitter * (torch.rand(count, 3, generator=generator) * 2 - 1)
    center = torch.tensor(list(POSITIONS.values()))[attributes["position"]] + SHIFT * shift[:, :2]
    radius = torch.tensor(list(SIZES.values()))[attributes["size"]] * (1 + STRETCH * shift[:, 2])
    return Scenes(attributes, center, radius)


def caption(words: dict[str, str], variant: int = 0) -> str:
    """The caption for `words`, a subset of a scene's attributes; `variant` (0 or 1) selects the background's phrase."""
    parts = [*(words[name] for name in ("size", "color") if name in words), words.get("shape", "shape")]
    parts.insert(0, "an" if parts[0][0] in "aeiou" else "a")
    if "position" in words:
        parts.append(PHRASES[words["position"]])
    text = " ".join(parts)
    if "background" not in words:
        return text
    return (
        f"{text}, {words['background']} background" if variant == 0 else f"{text} on a {words['background']} background"
    )


def name_some(words: dict[str, str], generator: torch.Generator) -> dict[str, str]:
    """A random subset of a scene's attributes; each is kept with its probability in `NAMED`."""
    draws = torch.rand(len(words), generator=generator).tolist()
    return {name: word for (name, word), u in zip(words.items(), draws, strict=True) if u < NAMED[name]}


def render(scenes: Scenes, resolution: int = RESOLUTION) -> torch.Tensor:
    """Render scenes with edges one pixel wide: float32 [B, 3, resolution, resolution] in [0, 1], sRGB values."""
    axis = (torch.arange(resolution) + 0.5) / resolution
    x = axis[None, None, :] - scenes.center[:, 0, None, None]
    y = axis[None, :, None] - scenes.center[:, 1, None, None]
    radius = scenes.radius[:, None, None]
    distance = torch.empty(len(scenes), resolution, resolution)
    for i, name in enumerate(SHAPES):
        rows = scenes.attributes["shape"] == i
        if rows.any():
            distance[rows] = _DISTANCES[name](x[rows], y[rows], radius[rows])
    coverage = (0.5 - distance * resolution).clamp(0, 1)[:, None]
    color = torch.tensor(list(COLORS.values()))[scenes.attributes["color"]][:, :, None, None] / 255
    background = torch.tensor(list(BACKGROUNDS.values()))[scenes.attributes["background"]][:, :, None, None] / 255
    return background + coverage * (color - background)


# Signed distances to each outline, negative inside, of the points (x, y) around the centre, y down: x [B, 1, W],
# y [B, H, 1] and radius [B, 1, 1] -> [B, H, W]. Formulas as commonly published for distance-field rendering; the
# shapes are scaled to look equally large.


def _box(x: torch.Tensor, y: torch.Tensor, half_x: torch.Tensor, half_y: torch.Tensor) -> torch.Tensor:
    dx, dy = x.abs() - half_x, y.abs() - half_y
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _circle(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.hypot(x, y) - 0.95 * r


def _square(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return _box(x, y, 0.83 * r, 0.83 * r)


def _triangle(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    # Three half planes of an equilateral triangle with circumradius 1.15 r, its middle lowered to sit centred.
    inner, y = 0.575 * r, y - 0.18 * r
    side = 0.5 * 3**0.5 * x.abs() - 0.5 * y
    return torch.maximum(side, y.expand_as(side)) - inner


def _diamond(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (x.abs() + y.abs() - 1.12 * r) / 2**0.5


def _cross(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.minimum(_box(x, y, r, 0.33 * r), _box(x, y, 0.33 * r, r))


def _heart(x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    # A square on its corner and two half discs on its upper sides.
    scale = 1.72 * r
    x, y = x.abs() / scale, 0.5 - y / scale + 0.03
    upper = torch.hypot(x - 0.25, y - 0.75) - 2**0.5 / 4
    half = 0.5 * (x + y).clamp(min=0)
    squared = torch.minimum(x**2 + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)
    lower = squared.sqrt() * torch.sign(x - y)
    return torch.where(x + y > 1, upper, lower) * scale


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "heart": _heart,
}
