"""What to draw on both sides: a prompt set's name or file -> prompts and the seeds of their noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_runtime.errors import RequestError

#: Captions of shapes, the only set whose named words a judge can look for.
SHAPES = "shapes"
#: Prompts without and with a judge: of 256 pairs a drop of two points is two standard errors, of 1,024 four.
LIMIT, LIMIT_WITH_JUDGE = 32, 1024


@dataclass(frozen=True)
class Case:
    """One prompt, the seed of its noise, and for the judge the words that it names."""

    prompt: str
    seed: int
    words: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Scene:
    """What every case is drawn with."""

    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float | None
    max_sequence_length: int


def read_cases(name: str, limit: int, seed: int) -> tuple[Case, ...]:
    """The first `limit` prompts of a set; case i gets the noise of `seed` + i.

    Args:
        name: "shapes", whose captions are drawn from `seed` and name what they show; another preset of
            `arcflow_export.formats.prompts`; or a file with one prompt per line.
        limit: how many.
        seed: of the noise, and of the captions of shapes.

    Raises:
        RequestError: `limit` or `seed` is out of range.
        ArcFlowError: there is no such set or file, or it is empty.
    """
    if limit < 1:
        raise RequestError(f"--limit must be at least 1, got {limit}")
    if not 0 <= seed < 2**32:
        raise RequestError(f"--seed must be between 0 and 2**32 - 1, got {seed}")
    if name == SHAPES:
        from arcflow_export.images.cases import draw_cases

        drawn = draw_cases(max(limit, 2), seed)
        rows = zip(drawn.captions, drawn.seeds, drawn.words, strict=True)
        return tuple(Case(caption, s, words) for caption, s, words in rows)[:limit]
    from arcflow_export.formats.prompts import read_prompts

    return tuple(Case(text, seed + i) for i, text in enumerate(read_prompts(name, limit).texts))
