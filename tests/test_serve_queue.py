"""The queue of the service: batches, turns of clients, room, and places that become free."""

from __future__ import annotations

import threading
import time

import pytest

from arcflow_serve.encode_image import Encoding
from arcflow_serve.jobs import BatchKey, Job
from arcflow_serve.waiting import WaitingRoom

FAR = 1e12


def key(width: int = 64, model: str = "m") -> BatchKey:
    return BatchKey(model, 64, width, 2, None, 0)


def job(prompt: str, client: str = "a", n: int = 1, width: int = 64, deadline: float = FAR) -> Job:
    return Job(client, key(width), prompt, tuple(range(n)), Encoding(), deadline, lambda event: None)


def room(capacity: int = 100, max_batch: int = 8) -> WaitingRoom:
    return WaitingRoom(capacity, lambda key: max_batch)


def prompts(batch) -> list[str]:
    return [picture.job.prompt for picture in batch]


def put(waiting: WaitingRoom, *jobs: Job) -> None:
    for x in jobs:
        assert waiting.put(x) == []


def test_a_batch_takes_what_waits_for_the_same_key_and_no_more_than_allowed():
    waiting = room(max_batch=3)
    put(waiting, job("1"), job("2", width=32), job("3"), job("4"), job("5"))
    assert prompts(waiting.take()) == ["1", "3", "4"]
    # The other size came before the rest.
    assert prompts(waiting.take()) == ["2"]
    assert prompts(waiting.take()) == ["5"]
    assert len(waiting) == 0


def test_clients_take_turns():
    waiting = room(max_batch=1)
    put(waiting, job("a1"), job("a2"), job("a3"), job("b1", "b"), job("b2", "b"), job("c1", "c"))
    assert [prompts(waiting.take()) for _ in range(6)] == [["a1"], ["b1"], ["c1"], ["a2"], ["b2"], ["a3"]]


def test_turns_within_a_batch():
    waiting = room(max_batch=4)
    put(waiting, job("a", n=5), job("b1", "b"), job("c1", "c", n=2))
    batch = waiting.take()
    assert prompts(batch) == ["a", "b1", "c1", "a"]
    assert [p.index for p in batch] == [0, 0, 0, 1]


def test_idle_lanes_share_what_waits():
    """Two lanes wait; two pictures that come together are one for each, not two for the first."""
    waiting, taken = room(), []
    threads = [threading.Thread(target=lambda: taken.append(prompts(waiting.take()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while waiting._idle < 2:
        time.sleep(0.001)
    put(waiting, job("x", n=2))
    for thread in threads:
        thread.join(10)
    assert taken == [["x"], ["x"]]


def test_a_full_room_refuses_all_pictures_of_a_job():
    waiting = room(capacity=3)
    put(waiting, job("1", n=2))
    assert waiting.put(job("2", n=2)) is None
    put(waiting, job("3"))
    assert len(waiting) == 3


def test_a_client_that_fills_the_room_makes_room_for_others():
    waiting = room(capacity=4, max_batch=1)
    first, second, third = job("a1", n=2), job("a2"), job("a3")
    put(waiting, first, second, third)
    assert waiting.put(job("a4")) is None
    # The newest job of the client with the most pictures.
    assert waiting.put(job("b1", "b")) == [third]
    assert waiting.put(job("b2", "b")) == [second]
    # Both have two now.
    assert waiting.put(job("b3", "b")) is None
    assert waiting.put(job("c1", "c")) == [first]
    assert len(waiting) == 3


def test_a_job_that_has_started_keeps_its_place():
    waiting = room(capacity=3, max_batch=1)
    put(waiting, job("a1", n=3))
    waiting.take()
    put(waiting, job("b1", "b"))
    assert waiting.put(job("c1", "c")) is None


def test_nothing_is_lost_when_the_room_cannot_be_made():
    """To make room for three, one victim is not enough and the second would be unfair."""
    waiting = room(capacity=4)
    put(waiting, job("a1"), job("a2"), job("b1", "b"), job("b2", "b"))
    assert waiting.put(job("c1", "c", n=3)) is None
    assert len(waiting) == 4


def test_a_job_that_is_removed_is_not_taken():
    waiting = room()
    gone, stays = job("gone", n=2), job("stays")
    put(waiting, gone, stays)
    waiting.remove(gone)
    waiting.remove(gone)
    assert prompts(waiting.take()) == ["stays"]
    assert len(waiting) == 0


def test_jobs_past_their_deadline():
    waiting = room(max_batch=1)
    late, started, early = job("late", deadline=0), job("started", "b", n=2, deadline=0), job("early", "c")
    put(waiting, started, late, early)
    assert prompts(waiting.take()) == ["started"]
    assert waiting.expired() == [late]
    assert len(waiting) == 2


def test_closing_ends_lanes_that_wait():
    waiting, taken = room(), []
    thread = threading.Thread(target=lambda: taken.append(waiting.take()))
    thread.start()
    while not waiting._idle:
        time.sleep(0.001)
    assert waiting.close() == []
    thread.join(10)
    assert taken == [[]]


def test_closing_returns_the_jobs_that_are_left():
    waiting, left = room(), job("left", n=2)
    put(waiting, left)
    assert waiting.close() == [left]
    assert len(waiting) == 0
    assert waiting.take() == []


@pytest.mark.parametrize("lanes", [1, 3])
def test_many_threads_take_every_picture_once(lanes):
    waiting, taken = room(capacity=10_000), []

    def lane():
        while batch := waiting.take():
            assert len({p.job.key for p in batch}) == 1
            taken.extend((p.job.prompt, p.index) for p in batch)

    threads = [threading.Thread(target=lane) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    jobs = [job(f"{i}", f"client {i % 7}", n=i % 4 + 1, width=16 * (i % 3 + 1)) for i in range(500)]
    put(waiting, *jobs)
    while len(waiting):
        time.sleep(0.001)
    waiting.close()
    for thread in threads:
        thread.join(10)
    assert sorted(taken) == sorted((x.prompt, i) for x in jobs for i in range(len(x.seeds)))
