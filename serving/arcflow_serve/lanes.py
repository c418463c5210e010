"""The lanes: threads that take batches, generate and encode them, and answer for everything that goes wrong.

A batch that fails is repeated picture by picture, so that only the picture that causes it fails. A lane whose batch
takes too long is given up and replaced. Nothing that a request does ends a lane.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from arcflow_runtime.errors import RequestError
from arcflow_runtime.generate.pipeline import Pipeline, PipelineOutput
from arcflow_serve.errors import FAILED, UNAVAILABLE, ServiceError, bad_request, is_out_of_memory
from arcflow_serve.jobs import BatchKey, Event, Failed, Finished, Job, Picture, Preview
from arcflow_serve.metrics import LaneMetrics
from arcflow_serve.models import Model
from arcflow_serve.settings import Settings
from arcflow_serve.waiting import WaitingRoom

_log = logging.getLogger("arcflow.serve")
#: A client whose request ran out of memory may try again after this time.
_MEMORY_RETRY_S = 5


@dataclass(eq=False)
class _Lane:
    """A thread, and what it is doing."""

    #: The core on which it stays while all lanes are busy, if it has one.
    core: int | None
    #: True while it stays there.
    stays: bool = False
    thread: threading.Thread = field(init=False)
    batch: list[Picture] = field(default_factory=list)
    pipeline: Pipeline | None = None
    #: When it began to generate; infinity until then.
    since: float = math.inf
    lost: bool = False
    #: Held to change `batch` or `lost`, so that a lane cannot be given up at the moment in which it finishes.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def give_up(self, timeout_s: float) -> list[Picture] | None:
        """Mark the lane as lost if its thread has ended or its batch takes longer; its batch, or None if it is well."""
        with self.lock:
            hangs = bool(self.batch) and time.monotonic() - self.since > timeout_s
            if not hangs and self.thread.is_alive():
                return None
            self.lost = True
            return self.batch


class Lanes:
    """The threads of one service."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        room: WaitingRoom,
        caps: BatchCaps,
        send: Callable[[Job, Event], None],
        metrics: LaneMetrics,
    ) -> None:
        """See `Service`, which makes them.

        Args:
            settings: of the service.
            models: by name.
            room: where pictures wait.
            caps: told which batches were too large.
            send: called with every event of a job.
            metrics: told about every batch.
        """
        self._count, self._hang_timeout_s = settings.lanes, settings.hang_timeout_s
        self._cores = settings.lane_cores
        self._models, self._room, self._caps = models, room, caps
        self._send, self._metrics = send, metrics
        self._lanes: list[_Lane] = []
        #: What an image takes in one lane, over about the last ten batches; 0 before the first.
        self.seconds_per_image = 0.0
        #: Number of lanes that were given up.
        self.lost = 0

    def start(self) -> None:
        """Start the threads."""
        for i in range(self._count):
            self._add(self._cores[i] if self._cores else None)

    def busy(self) -> int:
        """Number of lanes that are generating."""
        return sum(bool(lane.batch) for lane in self._lanes)

    def alive(self) -> int:
        """Number of lanes that can take a batch, now or when they are done."""
        return sum(lane.thread.is_alive() for lane in self._lanes)

    def repair(self) -> None:
        """Replace lanes whose batch takes too long, and threads that ended."""
        for lane in list(self._lanes):
            batch = lane.give_up(self._hang_timeout_s)
            if batch is None:
                continue
            self._lanes.remove(lane)
            self.lost += 1
            _log.error("a lane is replaced: its batch of %d took more than %g s", len(batch), self._hang_timeout_s)
            # Read once: the thread may still return, and set it to None.
            if batch and (pipeline := lane.pipeline) is not None:
                self._models[batch[0].job.key.model].abandon(pipeline)
            for picture in batch:
                message = (
                    f"generating the image took more than {self._hang_timeout_s:g} s and was given up; "
                    "ask for a smaller image or fewer steps, or start the service with a larger --hang-timeout"
                )
                error = ServiceError(FAILED, "engine_hangs", message, retry=False)
                self._send(picture.job, Failed(error))
            self._add()

    def join(self, timeout_s: float) -> None:
        """Wait for lanes to end after their room was closed."""
        until = time.monotonic() + timeout_s
        for lane in self._lanes:
            lane.thread.join(max(0.0, until - time.monotonic()))

    def _add(self, core: int | None = None) -> None:
        # A daemon, because a lane that hangs must not keep the process from ending.
        lane = _Lane(core)
        lane.thread = threading.Thread(target=self._run, args=(lane,), name="arcflow-lane", daemon=True)
        self._lanes.append(lane)
        lane.thread.start()

    def _run(self, lane: _Lane) -> None:
        while not lane.lost and (batch := self._room.take()):
            with lane.lock:
                lane.since, lane.batch = math.inf, batch
            try:
                self._place(lane)
                self._generate(lane, batch)
            except BaseException as e:
                # Nothing may end a lane, not even an exception of our own code.
                _log.exception("a lane failed")
                for picture in batch:
                    self._fail(lane, picture, e)
            finally:
                with lane.lock:
                    lane.batch, lane.pipeline = [], None

    def _place(self, lane: _Lane) -> None:
        """Keep a lane on its core if all lanes are busy. Linux often lets two wait for one core while another is idle.

        A lane that is busy alone may use every core, because another program may be busy on its own one. After a lane
        has hung, no lane is kept on a core, because the one that hangs may still occupy its own.
        """
        stays = lane.core is not None and not self.lost and self.busy() == self._count
        if stays == lane.stays:
            return
        try:
            os.sched_setaffinity(0, [lane.core] if stays and lane.core is not None else self._cores)
            lane.stays = stays
        except OSError as e:
            _log.warning("lanes are not kept on cores of their own: %s", e)
            self._cores, lane.core = [], None

    def _generate(self, lane: _Lane, batch: list[Picture]) -> bool:
        """Generate a batch, and again picture by picture if it fails; False if a picture failed."""
        batch = [p for p in batch if not p.job.over]
        if not batch or lane.lost:
            return True
        lane.since = math.inf
        key = batch[0].job.key
        model = self._models[key.model]
        try:
            with model.use() as pipeline:
                # From here on, not while the bundle was being loaded again.
                lane.pipeline, lane.since = pipeline, time.monotonic()
                arguments: dict[str, object] = {"loras": dict(key.loras)} if key.loras else {}
                if key.true_cfg_scale is not None:
                    arguments["negative_prompt"] = [p.job.negative_prompt for p in batch]
                    arguments["true_cfg_scale"] = key.true_cfg_scale
                if key.previews:
                    arguments["callback_on_preview"] = partial(self._preview, lane, batch)
                    arguments["max_previews"] = key.previews
                output = pipeline(
                    [p.job.prompt for p in batch],
                    height=key.height_px,
                    width=key.width_px,
                    num_inference_steps=key.num_inference_steps,
                    guidance_scale=key.guidance_scale,
                    seed=[p.seed for p in batch],
                    **arguments,  # type: ignore[arg-type]
                )
        except BaseException as e:
            if len(batch) == 1:
                self._fail(lane, batch[0], e)
                if not isinstance(e, RequestError):
                    model.failed(for_memory=is_out_of_memory(e))
                return False
            _log.warning("a batch of %d is repeated one by one: %s: %s", len(batch), type(e).__name__, e)
            return self._one_by_one(lane, batch, for_memory=is_out_of_memory(e))
        model.succeeded()
        self._deliver(lane, batch, output)
        return True

    def _one_by_one(self, lane: _Lane, batch: list[Picture], for_memory: bool) -> bool:
        well = True
        for picture in batch:
            well = self._generate(lane, [picture]) and well
        if well and for_memory:
            # Each of them fits alone, so together they were too large.
            self._caps.lower(batch[0].job.key, len(batch))
        return well

    def _deliver(self, lane: _Lane, batch: list[Picture], output: PipelineOutput) -> None:
        latest = output.timings_ms["total"] / 1e3 / len(batch)
        self.seconds_per_image += (latest - self.seconds_per_image) * (0.1 if self.seconds_per_image else 1)
        metrics = self._metrics
        metrics.note(metrics.batch, len(batch))
        metrics.note(metrics.images, len(batch), batch[0].job.key.model)
        for stage, ms in output.timings_ms.items():
            metrics.note(metrics.stage, ms / 1e3, stage)
        for picture, image in zip(batch, output.images, strict=True):
            started = time.perf_counter()
            encoded = _encode(picture, image)
            seconds = time.perf_counter() - started
            metrics.note(metrics.stage, seconds, "compress")
            timings = dict(output.timings_ms) | {"compress": seconds * 1e3}
            self._post(lane, picture, Finished(picture.index, encoded, timings, len(batch)))

    def _preview(self, lane: _Lane, batch: list[Picture], step: int, images: list[Image.Image]) -> None:
        for picture, image in zip(batch, images, strict=True):
            if not picture.job.over:
                self._post(lane, picture, Preview(picture.index, _encode(picture, image)))

    def _fail(self, lane: _Lane, picture: Picture, error: BaseException) -> None:
        self._post(lane, picture, Failed(_service_error(error)))

    def _post(self, lane: _Lane, picture: Picture, event: Event) -> None:
        # The jobs of a lane that was given up have been answered.
        if not lane.lost:
            self._send(picture.job, event)


class BatchCaps:
    """The most pictures that a lane may take at a time: the setting, the bundle's limit, and what turned out to fit."""

    def __init__(self, max_batch: int, models: Mapping[str, Model]) -> None:
        self._most = {name: min(max_batch, m.manifest.ranges.batch.max) for name, m in models.items()}
        self._found: dict[tuple[str, int, int], int] = {}

    def __call__(self, key: BatchKey) -> int:
        """The most pictures of a batch with this key."""
        return self._found.get((key.model, key.height_px, key.width_px), self._most[key.model])

    def lower(self, key: BatchKey, failed: int) -> None:
        """Note that a batch of `failed` pictures failed although each of them alone succeeded."""
        self._found[key.model, key.height_px, key.width_px] = max(1, failed // 2)


def _encode(picture: Picture, image: Image.Image) -> bytes:
    job = picture.job
    text = {"prompt": job.prompt, "seed": str(picture.seed), "steps": str(job.key.num_inference_steps)}
    if job.negative_prompt is not None:
        text |= {"negative_prompt": job.negative_prompt, "true_cfg_scale": f"{job.key.true_cfg_scale:g}"}
    return job.encoding.encode(image, text)


def _service_error(error: BaseException) -> ServiceError:
    """What the client is told about an exception of the runtime."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestError):
        return bad_request(str(error))
    message = str(error) or type(error).__name__
    if is_out_of_memory(error):
        return ServiceError(
            UNAVAILABLE,
            "out_of_memory",
            f"there is not enough memory for this image now ({message}); try again, or ask for a smaller one",
            retry_after_s=_MEMORY_RETRY_S,
        )
    # The picture was generated alone and failed, so the same request would fail again.
    return ServiceError(FAILED, "engine_failed", message, retry=False)
