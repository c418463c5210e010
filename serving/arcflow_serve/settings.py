"""The service's settings, checked once: limits, lanes and times. The command line reads its defaults from here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from arcflow_runtime.backends import AUTO, DEFAULT_BACKEND, ON_CPU
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.modes import MemoryMode
from arcflow_runtime.errors import RequestError


def cores() -> int:
    """Number of cores that this process may use."""
    return len(core_numbers()) or os.cpu_count() or 1


def core_numbers() -> list[int]:
    """The cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def default_lanes() -> int:
    """Two lanes, or one on a single core: two of one thread are faster than one of two."""
    return min(2, cores())


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels from WIDTHxHEIGHT.

    Raises:
        ValueError: it has another form.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if match is None:
        raise ValueError(f"must be WIDTHxHEIGHT in pixels such as 1024x768, got {text!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Settings:
    """Settings of one service.

    Attributes:
        backend: the library that runs the graphs, as for `Pipeline.load`.
        memory: which parts stay loaded, as for `Pipeline.load`; None follows from the free memory.
        loras: files of LoRAs that requests may use; each is named after its file.
        warm_up: sizes, as width and height in pixels, of which every batch size is generated once while a bundle is
            loaded, so that no request waits for a GPU's compilers and graphs.
        lanes: number of threads that generate images, each one batch at a time.
        threads: CPU threads of an engine in each lane; None shares the cores among the lanes.
        max_batch: most images that a lane generates at a time.
        max_queue: most images that may wait; beyond it requests get status 429.
        max_n: most images of one request.
        max_steps: most denoising steps of a request.
        max_px: largest height or width in pixels; None is the bundle's.
        max_prompt_chars: longest prompt.
        max_body_bytes: largest body of a request.
        max_connections: most open connections.
        body_timeout_s: time in which a client must have sent its request, headers and body each.
        write_timeout_s: time in which a client must read at least a part of what it is sent.
        deadline_s: a request that has waited for so long is answered with status 503.
        hang_timeout_s: a batch that takes longer is given up, and its lane replaced.
        drain_timeout_s: after SIGTERM, requests that take longer are answered with status 503.
        api_keys: keys of which a request must give one; empty allows every request.
    """

    backend: str = DEFAULT_BACKEND
    memory: MemoryMode | None = None
    loras: tuple[Path, ...] = ()
    warm_up: tuple[tuple[int, int], ...] = ()
    lanes: int = field(default_factory=default_lanes)
    threads: int | None = None
    max_batch: int = 8
    max_queue: int = 64
    max_n: int = 10
    max_steps: int = 50
    max_px: int | None = None
    max_prompt_chars: int = 4000
    max_body_bytes: int = 1 << 17
    max_connections: int = 1000
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    deadline_s: float = 600.0
    hang_timeout_s: float = 600.0
    drain_timeout_s: float = 600.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in (
            "lanes",
            "max_batch",
            "max_queue",
            "max_n",
            "max_steps",
            "max_prompt_chars",
            "max_body_bytes",
            "max_connections",
        ):
            if getattr(self, name) < 1:
                raise RequestError(f"{_option(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("body_timeout_s", "write_timeout_s", "deadline_s", "hang_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{_option(name)} must be a number of seconds above 0, got {getattr(self, name)}")
        for name in ("threads", "max_px"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"{_option(name)} must be at least 1, got {value}")
        if self.on_cpu and self.lanes * (self.threads or 1) > cores():
            raise RequestError(
                f"--lanes times --threads must be at most {cores()}, the number of cores, "
                f"got {self.lanes} * {self.threads or 1}; more threads than cores slow each other down"
            )
        if self.max_n > self.max_queue:
            raise RequestError(
                f"--max-n must be at most --max-queue, got {self.max_n} and {self.max_queue}: "
                "a request that is larger than the queue could never be accepted"
            )

    @property
    def on_cpu(self) -> bool:
        """True if the graphs run on the CPU."""
        return self.backend in ON_CPU or (self.backend == AUTO and find_gpu() is None)

    @property
    def engine_threads(self) -> int | None:
        """CPU threads of each engine; None lets a GPU's backend choose."""
        if self.threads is not None or not self.on_cpu:
            return self.threads
        return max(1, cores() // self.lanes)

    @property
    def lane_cores(self) -> list[int]:
        """The core of each lane, if the lanes compute in their own threads and there is one for each core, or none."""
        numbers = core_numbers()
        alone = self.backend == DEFAULT_BACKEND and self.engine_threads == 1 and self.lanes == len(numbers) > 1
        return numbers if alone else []


def _option(name: str) -> str:
    """The command line's option for a setting."""
    return "--" + name.removesuffix("_s").replace("_", "-")
