"""The bounded queue between the event loop and the lanes: jobs -> batches of pictures that fit together.

Clients take turns, and a client's own pictures keep their order. A lane takes what waits for the same batch key, shared
with the other idle lanes, and never waits for a batch to fill.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from arcflow_serve.jobs import BatchKey, Job, Picture


class WaitingRoom:
    """Pictures that wait for a lane; safe to use from several threads."""

    def __init__(
        self,
        capacity: int,
        max_batch: Callable[[BatchKey], int],
        ready: Callable[[BatchKey], bool] = lambda key: True,
    ) -> None:
        """Make an empty room.

        Args:
            capacity: the most pictures that may wait.
            max_batch: gives the most that a lane may take.
            ready: False for pictures that must wait, even if a lane is idle; `wake` says that this has changed.
        """
        self._capacity = capacity
        self._max_batch, self._ready = max_batch, ready
        self._changed = threading.Condition()
        #: By client, the client whose turn is next first.
        self._clients: OrderedDict[str, deque[Picture]] = OrderedDict()
        self._count = 0
        self._idle = 0
        self._closed = False

    def __len__(self) -> int:
        return self._count

    def put(self, job: Job) -> list[Job] | None:
        """Let all pictures of a job wait.

        If there is no room, the newest jobs of the client with the most waiting pictures make room, as long as that
        client has more of them than this job's client would have. So one client cannot shut out the others.

        Returns:
            The jobs that lost their places, usually none; or None if there is no room for this job.
        """
        wanted = len(job.seeds)
        with self._changed:
            if (victims := self._make_room(job.client, wanted)) is None:
                return None
            self._clients.setdefault(job.client, deque()).extend(job.pictures())
            self._count += wanted
            self._changed.notify(wanted)
            return victims

    def _make_room(self, client: str, wanted: int) -> list[Job] | None:
        if self._count + wanted <= self._capacity:
            return []
        lengths = {c: len(d) for c, d in self._clients.items()}
        own = lengths.get(client, 0) + wanted
        newest = {c: list(OrderedDict.fromkeys(p.job for p in reversed(d))) for c, d in self._clients.items()}
        free, victims = self._capacity - self._count, []
        while free < wanted:
            longest = max(lengths, key=lengths.__getitem__, default=client)
            # A job of which a part has started keeps its place.
            candidates = [j for j in newest.get(longest, []) if j.started is None and j not in victims]
            if longest == client or lengths[longest] <= own or not candidates:
                return None
            victims.append(candidates[0])
            size = len(candidates[0].seeds)
            free += size
            lengths[longest] -= size
        for victim in victims:
            self._remove(victim)
        return victims

    def take(self) -> list[Picture]:
        """Wait for pictures and take a batch of one key; an empty list if the room was closed."""
        with self._changed:
            self._idle += 1
            try:
                while (key := self._next_key()) is None and not self._closed:
                    self._changed.wait()
                return [] if key is None else self._batch(key)
            finally:
                self._idle -= 1

    def wake(self) -> None:
        """Let idle lanes look again which pictures are ready."""
        with self._changed:
            self._changed.notify_all()

    def _next_key(self) -> BatchKey | None:
        """The key of the first picture that is ready, of the client whose turn comes first."""
        return next((p.job.key for d in self._clients.values() for p in d if self._ready(p.job.key)), None)

    def _batch(self, key: BatchKey) -> list[Picture]:
        same = sum(p.job.key == key for waiting in self._clients.values() for p in waiting)
        # An idle lane beside this one is better used than a larger batch here.
        size = min(self._max_batch(key), -(-same // self._idle))
        batch: list[Picture] = []
        while len(batch) < size:
            for client in list(self._clients):
                waiting = self._clients[client]
                found = next((p for p in waiting if p.job.key == key), None)
                if found is None:
                    continue
                waiting.remove(found)
                batch.append(found)
                self._clients.move_to_end(client)
                if not waiting:
                    del self._clients[client]
                if len(batch) == size:
                    break
        self._count -= size
        now = time.monotonic()
        for picture in batch:
            picture.job.started = picture.job.started or now
        if self._count:
            self._changed.notify()
        return batch

    def remove(self, job: Job) -> None:
        """Remove the pictures of a job that still wait."""
        with self._changed:
            self._remove(job)

    def _remove(self, job: Job) -> None:
        waiting = self._clients.get(job.client)
        if waiting is None:
            return
        kept = deque(p for p in waiting if p.job is not job)
        self._count -= len(waiting) - len(kept)
        if kept:
            self._clients[job.client] = kept
        else:
            del self._clients[job.client]

    def expired(self) -> list[Job]:
        """Remove and return the jobs whose deadline has passed and of which nothing was started."""
        now = time.monotonic()
        with self._changed:
            waiting = OrderedDict.fromkeys(p.job for d in self._clients.values() for p in d)
            late = [job for job in waiting if job.deadline <= now and job.started is None]
            for job in late:
                self._remove(job)
        return late

    def close(self) -> list[Job]:
        """Remove and return all jobs, and let lanes that wait return."""
        with self._changed:
            jobs = list(OrderedDict.fromkeys(p.job for d in self._clients.values() for p in d))
            self._clients.clear()
            self._count = 0
            self._closed = True
            self._changed.notify_all()
        return jobs
