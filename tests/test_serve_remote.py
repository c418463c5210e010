"""Jobs that other processes generate: retries, limits and deadlines, with replicas that follow a script."""

from __future__ import annotations

import asyncio
import pickle
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from arcflow_serve.encode_image import Encoding
from arcflow_serve.errors import ServiceError
from arcflow_serve.jobs import BatchKey, Failed, Finished, Job, Preview
from arcflow_serve.remote import Progress, RemoteEngine, work_on
from arcflow_serve.settings import Settings

KEY = BatchKey("shapes", 64, 64, 2, None, 0, true_cfg_scale=4.0)


class DiedError(Exception):
    pass


class Replicas:
    """`Call` of replicas that say what a script has for each attempt; an exception in it is raised."""

    def __init__(self, *attempts: list) -> None:
        self.attempts, self.given, self.closed = list(attempts), [], 0

    async def __call__(self, work):
        self.given.append(work)
        try:
            for said in self.attempts.pop(0):
                if isinstance(said, Exception):
                    raise said
                if isinstance(said, asyncio.Event):
                    await said.wait()
                else:
                    yield said
        finally:
            self.closed += 1


def finished(picture: int) -> Progress:
    return Progress(Finished(picture, b"image", {}, 1), 0.25)


TAKEN = Progress()


def engine_of(replicas, **settings) -> RemoteEngine:
    return RemoteEngine({}, Settings(**settings), replicas, (DiedError,), lambda: 1)


def job_of(*seeds: int, deadline_s: float = 60.0) -> SimpleNamespace:
    events: asyncio.Queue = asyncio.Queue()
    deadline = time.monotonic() + deadline_s
    job = Job("client", KEY, "a red circle", seeds, Encoding(), deadline, events.put_nowait, "blurred")
    return SimpleNamespace(job=job, next=lambda: asyncio.wait_for(events.get(), 10), events=events)


def error_of(event) -> tuple[int, str, str]:
    assert isinstance(event, Failed)
    return event.error.status, event.error.code, str(event.error)


def test_what_a_dead_replica_had_not_finished_is_generated_by_another():
    async def main():
        preview = Progress(Preview(0, b"partial"))
        replicas = Replicas([TAKEN, finished(1), DiedError("gone")], [TAKEN, preview, finished(1), finished(0)])
        engine, asked = engine_of(replicas), job_of(7, 8, 9)
        engine.submit(asked.job)
        pictures = [(type(e).__name__, e.picture) for e in [await asked.next() for _ in range(4)]]
        # Of the second replica's two pictures, 0 has the seed 7 and 1 the seed 9.
        assert [w.seeds for w in replicas.given] == [(7, 8, 9), (7, 9)]
        assert pictures == [("Finished", 1), ("Preview", 0), ("Finished", 2), ("Finished", 0)]
        engine.release(asked.job)
        await asyncio.sleep(0)
        assert replicas.closed == 2 and asked.events.empty()

    asyncio.run(main())


def test_a_job_that_was_started_is_generated_again_after_its_deadline():
    async def main():
        late = asyncio.Event()
        replicas = Replicas([TAKEN, late, DiedError("gone")], [TAKEN, finished(0)])
        engine, asked = engine_of(replicas), job_of(7, deadline_s=0.1)
        engine.submit(asked.job)
        await asyncio.sleep(0.2)
        late.set()
        assert (await asked.next()).picture == 0
        # The second replica gets time to start it.
        assert replicas.given[1].deadline_s == engine.settings.deadline_s

    asyncio.run(main())


def test_a_request_that_kills_every_replica_is_given_up():
    async def main():
        replicas = Replicas(*[[TAKEN, DiedError("gone")]] * 4)
        engine, asked = engine_of(replicas), job_of(7)
        engine.submit(asked.job)
        event = await asked.next()
        message = "3 processes that generated the image ended, one after the other"
        assert error_of(event) == (500, "engine_failed", message)
        assert event.error.headers() == {"x-should-retry": "false"}
        assert len(replicas.given) == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([TAKEN, ValueError("broken")], "broken"),
        ([TAKEN], "a replica must answer with every image or an error, but its answer ended early"),
        ([], "a replica must answer with every image or an error, but its answer ended early"),
    ],
)
def test_whatever_a_replica_does_there_is_an_answer(said, message):
    async def main():
        engine, asked = engine_of(Replicas(said)), job_of(7)
        engine.submit(asked.job)
        assert error_of(await asked.next()) == (500, "engine_failed", message)

    asyncio.run(main())


def test_images_that_no_replica_has_taken_are_limited():
    async def main():
        opened = asyncio.Event()
        engine = engine_of(Replicas([opened, TAKEN, finished(0), finished(1)]), max_queue=3, max_n=3)
        first, second = job_of(1, 2), job_of(3, 4)
        engine.submit(first.job)
        with pytest.raises(ServiceError) as refused:
            engine.submit(second.job)
        assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "queue_full", 2)
        text = "3 images may wait at most, and there is no room for this request; try again later"
        assert str(refused.value) == text
        assert b"arcflow_requests_waiting 1.0" in engine.metrics.render()
        opened.set()
        assert [(await first.next()).picture for _ in range(2)] == [0, 1]
        rendered = engine.metrics.render()
        assert b"arcflow_requests_running 1.0" in rendered and b"arcflow_requests_waiting 0.0" in rendered
        # The replica says that it let the request wait for 0.25 s.
        assert first.job.started >= first.job.arrived + 0.25

    asyncio.run(main())


def test_a_request_that_no_replica_takes_in_time():
    async def main():
        engine, asked = engine_of(Replicas([asyncio.Event()]), deadline_s=3), job_of(1, deadline_s=0.01)
        engine.submit(asked.job)
        message = "the request waited for 3 s without being started; try again later"
        assert error_of(await asked.next()) == (503, "deadline_exceeded", message)

    asyncio.run(main())


def test_a_client_that_leaves_gives_up_its_work():
    async def main():
        replicas = Replicas([TAKEN, asyncio.Event()])
        engine, asked = engine_of(replicas), job_of(1)
        engine.submit(asked.job)
        while not asked.job.started:
            await asyncio.sleep(0)
        engine.release(asked.job)
        while not replicas.closed:
            await asyncio.sleep(0)
        assert asked.events.empty()

    asyncio.run(main())


class Accepts:
    """An `Engine` that delivers what it is told to."""

    def __init__(self, *events) -> None:
        self.events, self.released = events, []

    def submit(self, job: Job) -> None:
        for event in self.events:
            if isinstance(event, ServiceError):
                raise event
            job.deliver(event)

    def release(self, job: Job) -> None:
        self.released.append(job)


@asynccontextmanager
async def remote(replica: Accepts):
    """An engine with one replica, whose messages are pickled as Ray does it."""

    async def call(work):
        async for progress in work_on(replica, pickle.loads(pickle.dumps(work))):
            yield pickle.loads(pickle.dumps(progress))

    yield engine_of(call)


def test_a_replica_delivers_its_events():
    async def main():
        events = (Preview(1, b"partial"), Finished(1, b"b", {"decode": 1.5}, 2), Finished(0, b"a", {}, 2))
        replica, asked = Accepts(*events), job_of(1, 2)
        async with remote(replica) as engine:
            engine.submit(asked.job)
            assert tuple([await asked.next() for _ in events]) == events
            while not replica.released:
                await asyncio.sleep(0)
        (theirs,) = replica.released
        assert (theirs.client, theirs.key, theirs.prompt, theirs.seeds) == ("client", KEY, "a red circle", (1, 2))
        assert theirs.negative_prompt == "blurred"
        assert 59 < theirs.deadline - time.monotonic() < 60

    asyncio.run(main())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_replicas_errors_arrive_whole(at_once):
    async def main():
        error = ServiceError(503, "out_of_memory", "there is not enough memory", "size", 5, False)
        asked = job_of(1)
        async with remote(Accepts(error if at_once else Failed(error))) as engine:
            engine.submit(asked.job)
            found = (await asked.next()).error
        assert found.body() == error.body() and found.headers() == error.headers() and found.status == 503

    asyncio.run(main())
