"""The cases of a drift gate: a prompt set's name or a file -> prompts with the seeds of their noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_runtime.errors import RequestError

#: The prompt set of shape captions, the only one that a judge can check.
SHAPES = "shapes"
#: Default number of prompts, without and with a judge. A drop of two percentage points is two standard errors with 256
#: pairs and four with 1,024.
LIMIT, LIMIT_WITH_JUDGE = 32, 1024


@dataclass(frozen=True)
class DriftCase:
    """One prompt, the seed of its noise, and for the judge the attributes that it names."""

    prompt: str
    seed: int
    words: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ImageSettings:
    """The settings with which every case is generated; `negative_prompt` guides with `true_cfg_scale`, above 1."""

    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float | None
    max_sequence_length: int
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0

    @property
    def calls(self) -> int:
        """Network calls of an image."""
        return self.num_inference_steps * (1 if self.negative_prompt is None else 2)


def read_cases(name: str, limit: int, seed: int) -> tuple[DriftCase, ...]:
    """Read the first `limit` prompts of a set; case i gets the noise of seed `seed` + i.

    Args:
        name: "shapes" for random captions of shapes; another preset of `arcflow_export.formats.prompts`; or a file with
            one prompt per line.
        limit: number of prompts.
        seed: seed of the first case's noise, and of the captions of shapes.

    Raises:
        RequestError: `limit` or `seed` is out of range.
        ArcFlowError: the set or file does not exist, or is empty.
    """
    if limit < 1:
        raise RequestError(f"--limit must be at least 1, got {limit}")
    if not 0 <= seed < 2**32:
        raise RequestError(f"--seed must be between 0 and 2**32 - 1, got {seed}")
    if name == SHAPES:
        from arcflow_export.images.cases import draw_cases

        shapes = draw_cases(max(limit, 2), seed)
        rows = zip(shapes.captions, shapes.seeds, shapes.words, strict=True)
        return tuple(DriftCase(caption, s, words) for caption, s, words in rows)[:limit]
    from arcflow_export.formats.prompts import read_prompts

    return tuple(DriftCase(text, seed + i) for i, text in enumerate(read_prompts(name, limit).texts))
