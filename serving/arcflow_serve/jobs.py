"""What the event loop and the lanes pass to each other: a request as a `Job` of pictures, and events about them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from arcflow_serve.encode_image import Encoding
from arcflow_serve.errors import ServiceError


@dataclass(frozen=True)
class BatchKey:
    """What the pictures of one batch have in common.

    `previews` is the most partial images of each, `loras` are (name, scale), by name, and `true_cfg_scale` is None for
    pictures that are not guided by a negative prompt. Their negative prompts may differ.
    """

    model: str
    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float | None
    previews: int
    loras: tuple[tuple[str, float], ...] = ()
    true_cfg_scale: float | None = None


@dataclass(frozen=True)
class Preview:
    """A partial image, encoded."""

    picture: int
    image: bytes


@dataclass(frozen=True)
class Finished:
    """An image, encoded, the milliseconds of each stage, and the number of images generated together."""

    picture: int
    image: bytes
    timings_ms: Mapping[str, float]
    batch_size: int


@dataclass(frozen=True)
class Failed:
    """The request is over without its images."""

    error: ServiceError


Event = Preview | Finished | Failed


@dataclass(eq=False)
class Job:
    """A checked request: `len(seeds)` pictures of one prompt, which may be in different batches.

    Attributes:
        client: whose turn it takes in the queue.
        deadline: the `time.monotonic()` after which it is no longer worth starting.
        deliver: called from any thread with each event; must not block.
        negative_prompt: set if the key has a `true_cfg_scale`.
    """

    client: str
    key: BatchKey
    prompt: str
    seeds: tuple[int, ...]
    encoding: Encoding
    deadline: float
    deliver: Callable[[Event], None]
    negative_prompt: str | None = None
    arrived: float = field(default_factory=time.monotonic)
    #: When a lane took the first picture.
    started: float | None = None
    #: Set when the request is over; pictures of it that are still being generated are then dropped.
    over: bool = False
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.seeds)

    def pictures(self) -> list[Picture]:
        """One for each seed."""
        return [Picture(self, i) for i in range(len(self.seeds))]


@dataclass(eq=False)
class Picture:
    """One image of a job: the unit that waits and is batched."""

    job: Job
    index: int

    @property
    def seed(self) -> int:
        """The seed of its noise."""
        return self.job.seeds[self.index]
