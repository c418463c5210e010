"""The service without HTTP: checked jobs in, events out; it owns the queue, the lanes and the models.

`Engine` is what the web application needs. Another implementation of it may pass jobs on to other machines.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from typing import Protocol

from arcflow_serve.errors import UNAVAILABLE, ServiceError, queue_is_full, waited_too_long
from arcflow_serve.jobs import Event, Failed, Finished, Job
from arcflow_serve.lanes import BatchCaps, Lanes
from arcflow_serve.metrics import LaneMetrics, Metrics
from arcflow_serve.models import Model
from arcflow_serve.settings import Settings
from arcflow_serve.waiting import WaitingRoom

_log = logging.getLogger("arcflow.serve")
_KEEPER_S = 0.1
#: At the end, threads get this time to return.
_CLOSE_S = 5.0
#: More lost lanes than this many times their number, and the process should be started anew.
_LOST_PER_LANE = 2
_MAX_RETRY_AFTER_S = 60


class Engine(Protocol):
    """What the web application needs of a service."""

    models: Mapping[str, Model]

    @property
    def metrics(self) -> Metrics:
        """Counters of requests, and whatever else `/metrics` shows."""
        ...

    def submit(self, job: Job) -> None:
        """Accept a job, whose events are delivered from then on.

        Raises:
            ServiceError: there is no room for it, or the service is shutting down.
        """
        ...

    def release(self, job: Job) -> None:
        """Forget a job that was answered or whose client left: what still waits of it is not generated.

        Every accepted job must be released; until then it counts as running or waiting.
        """
        ...

    def not_ready(self) -> list[str]:
        """Reasons not to send requests here now."""
        ...

    def not_healthy(self) -> list[str]:
        """Reasons to start this process anew."""
        ...


class Service:
    """Generates jobs on this machine."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self.models = models
        self.settings = settings
        self.metrics = LaneMetrics()
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        caps = BatchCaps(settings.max_batch, models)
        # While a bundle is loaded again, its requests wait in the queue, and lanes generate those of other bundles.
        self._room = WaitingRoom(settings.max_queue, caps, lambda key: not models[key.model].loading)
        self._lanes = Lanes(settings, models, self._room, caps, self._send, self.metrics)
        self._draining = False
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="arcflow-keeper", daemon=True)
        self._add_gauges()

    def start(self) -> None:
        """Start the lanes."""
        self._lanes.start()
        self._keeper.start()

    def submit(self, job: Job) -> None:
        """See `Engine.submit`."""
        if self._draining:
            raise self._shutting_down()
        with self._lock:
            self._jobs.add(job)
        victims = self._room.put(job)
        if victims is None:
            with self._lock:
                self._jobs.discard(job)
            raise self._queue_is_full()
        for victim in victims:
            self._send(victim, Failed(self._queue_is_full()))

    def release(self, job: Job) -> None:
        """See `Engine.release`."""
        with self._lock:
            job.over = True
            self._jobs.discard(job)
        self._room.remove(job)

    def drain(self) -> None:
        """Take no more jobs; those that are here are finished."""
        self._draining = True

    @property
    def drained(self) -> bool:
        """True after `drain` when every job has been released."""
        return self._draining and not self._jobs

    def close(self) -> None:
        """Answer every job that is left with an error, stop the lanes and free the models."""
        self._draining = True
        self._room.close()
        for job in list(self._jobs):
            self._send(job, Failed(self._shutting_down()))
        self._closing.set()
        if self._keeper.is_alive():
            self._keeper.join(_CLOSE_S)
        self._lanes.join(_CLOSE_S)
        for model in self.models.values():
            model.close()

    def not_ready(self) -> list[str]:
        """See `Engine.not_ready`."""
        reasons = self.not_healthy()
        if self._draining:
            reasons.append("the service is shutting down")
        reasons += [f"model {m.name!r} is being loaded" for m in self.models.values() if not m.loaded]
        return reasons

    def not_healthy(self) -> list[str]:
        """See `Engine.not_healthy`."""
        reasons = [f"model {m.name!r} cannot be loaded: {m.trouble}" for m in self.models.values() if m.trouble]
        for model in self.models.values():
            # Its files may come from a slow disk, and what its engines compile is not a call that hangs.
            if model.loading_s > (limit_s := self.settings.hang_timeout_s + model.first_load_s):
                reasons.append(f"model {model.name!r} has been loading for more than {limit_s:.0f} s")
        if not self._keeper.is_alive():
            reasons.append("the thread that watches the lanes has ended")
        if not self._lanes.alive():
            reasons.append("no lane is alive")
        if self._lanes.lost > (limit := _LOST_PER_LANE * self.settings.lanes):
            reasons.append(f"{self._lanes.lost} lanes did not return from an engine, more than {limit}")
        return reasons

    def _send(self, job: Job, event: Event) -> None:
        """Deliver an event and keep count; what comes after a job's end is dropped."""
        with self._lock:
            if job.over:
                return
            if isinstance(event, Finished):
                job.unfinished -= 1
            job.over = isinstance(event, Failed) or not job.unfinished
        if isinstance(event, Failed):
            self._room.remove(job)
        job.deliver(event)

    def _keep(self) -> None:
        """Until the service closes: replace lanes, load models again, answer requests that waited too long."""
        while not self._closing.wait(_KEEPER_S):
            try:
                self._lanes.repair()
                for job in self._room.expired():
                    self._send(job, Failed(waited_too_long(self.settings.deadline_s, self._retry_after_s())))
                for model in self.models.values():
                    if model.due:
                        # In a thread of its own: it may take minutes, or hang.
                        threading.Thread(target=self._restore, args=(model,), name="arcflow-load", daemon=True).start()
            except Exception:
                _log.exception("the keeper failed; it goes on")

    def _restore(self, model: Model) -> None:
        model.restore()
        self._room.wake()

    def _queue_is_full(self) -> ServiceError:
        return queue_is_full(self.settings.max_queue, self._retry_after_s())

    def _shutting_down(self) -> ServiceError:
        return ServiceError(
            UNAVAILABLE, "shutting_down", "the service is shutting down; try again at another one", retry_after_s=1
        )

    def _retry_after_s(self) -> int:
        """The time in which the lanes generate what is waiting now."""
        seconds = len(self._room) * self._lanes.seconds_per_image / self.settings.lanes
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_AFTER_S)

    def _add_gauges(self) -> None:
        def count(started: bool) -> int:
            with self._lock:
                return sum((job.started is not None) is started for job in self._jobs)

        gauge = self.metrics.gauge
        gauge("arcflow_requests_running", "Requests of which an image was started.", lambda: count(True))
        gauge("arcflow_requests_waiting", "Requests of which no image was started.", lambda: count(False))
        gauge("arcflow_images_waiting", "Images that wait for a lane.", lambda: len(self._room))
        gauge("arcflow_lanes", "Threads that generate images.", self._lanes.alive)
        gauge("arcflow_lanes_busy", "Threads that are generating now.", self._lanes.busy)
        gauge("arcflow_lanes_lost", "Threads that did not return from an engine.", lambda: self._lanes.lost)
        gauge("arcflow_ready", "1 if the service takes requests.", lambda: not self.not_ready())
