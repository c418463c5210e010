"""The interfaces between the pipeline and what runs a bundle.

An `Engine` runs one graph: named arrays in -> named arrays out. A `Denoiser` runs everything after the text encoders
where its backend can keep that on a device: noise and text states -> latents and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from ..bundle import Bundle

if TYPE_CHECKING:
    from ..parts import Parts
    from ..stopwatch import Stopwatch
    from ..text import Embeddings

#: Called with a step's index and the latents after it, [b, N, C] float32.
OnStep = Callable[[int, np.ndarray], None]


class Engine(Protocol):
    """One loaded part of a bundle, ready to run; safe to call from several threads."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: one array per input of the part's manifest entry, of its dtype and shape; bfloat16 as in `dtypes`.

        Returns:
            One array per output of the part's manifest entry.

        Raises:
            EngineError: the engine failed; the message names the part.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. Calling it twice is allowed; running afterwards is an error."""
        ...


@runtime_checkable
class StreamedEngine(Protocol):
    """An engine whose weights are not all in memory: it reads them once for any number of inputs."""

    def run_all(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Run the graph on several sets of inputs; give each one's outputs in turn. See `Engine.run`."""
        ...


class Backend(Protocol):
    """Opens parts of bundles as engines."""

    def check(self, bundle: Bundle) -> None:
        """Raise `EngineError` if this backend cannot run `bundle`, before anything is loaded."""
        ...

    def open(self, bundle: Bundle, part: str) -> Engine:
        """Load part `part` of `bundle`."""
        ...


@dataclass(frozen=True)
class Drawing:
    """What is drawn at once: b images whose texts have one length T.

    `streams` [b, 2] int64 of the noise, as `noise.streams` gives them; `texts`, one per image; `image_rotary`
    [2, N, D/2] and `text_rotary` [2, T, D/2] float32; `grid`, height and width in tokens; `sigmas` [S+1] float64;
    `timesteps` [S] float32 and `guidance`, what the conditioner sees; `table`, the baked modulation [S, M] float32
    where the bundle has it; `pixels`, whether pictures are asked for and not only latents.
    """

    streams: np.ndarray
    texts: Sequence[Embeddings]
    image_rotary: np.ndarray
    text_rotary: np.ndarray
    grid: tuple[int, int]
    sigmas: np.ndarray
    timesteps: np.ndarray
    guidance: np.float32 | None
    table: np.ndarray | None
    pixels: bool


@dataclass(frozen=True)
class Drawn:
    """`latents` [b, N, C] float32, and `pixels` [b, H, W, 3] uint8 if they were asked for."""

    latents: np.ndarray
    pixels: np.ndarray | None


class Denoiser(Protocol):
    """Draws on a device what the text encoders prepared; safe to call from several threads."""

    def draw(self, drawing: Drawing, watch: Stopwatch, on_step: OnStep | None = None) -> Drawn:
        """Condition, run every step, decode.

        Args:
            drawing: what to draw.
            watch: gets the time of each stage on the device.
            on_step: called after every step, before the next one starts; the latents are its own.

        Raises:
            EngineError: an engine failed, does not take these shapes, or memory ran out.
        """
        ...

    def warm_up(self, drawing: Drawing) -> None:
        """Make ready whatever `draw` would make on the first pictures of this shape; nothing is given back."""
        ...

    def close(self) -> None:
        """Wait for pictures being drawn and free the memory; drawing afterwards raises `EngineError`."""
        ...


@runtime_checkable
class DenoisingBackend(Protocol):
    """A backend that can keep the whole loop on its device."""

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> Denoiser | None:
        """The denoiser of `bundle`, whose engines it takes from `parts`; None where this installation has none."""
        ...


@dataclass(frozen=True)
class LayerTime:
    """One layer of one run: `operator` is "" where unknown; `start_us` counts from any point common to the engine."""

    layer: str
    operator: str
    start_us: float
    duration_us: float


class ProfiledEngine(Engine, Protocol):
    """An engine that times its layers."""

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far, in order; it cannot run afterwards."""
        ...


@runtime_checkable
class ProfilingBackend(Protocol):
    """A backend that can time layers."""

    def open_profiled(self, bundle: Bundle, part: str) -> ProfiledEngine:
        """Load `part` so that it times its layers; it may run slower."""
        ...
