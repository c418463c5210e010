"""Lanes and cores: lanes that are all busy stay on cores of their own, and one that is busy alone may use all."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from arcflow_serve import settings
from arcflow_serve.settings import Settings
from tests.conftest import SHAPES_OPTIONS
from tests.serving import Gate, images_of, serve, wait_until, wrap

#: Where a thread runs that nobody has placed.
EVERYWHERE = settings.core_numbers()
pytestmark = pytest.mark.skipif(len(EVERYWHERE) < 2, reason="needs two cores, and a system that tells")


@pytest.fixture
def cores(monkeypatch) -> list[int]:
    """Two cores, the only ones that the service knows."""
    two = EVERYWHERE[:2]
    monkeypatch.setattr(settings, "core_numbers", lambda: two)
    return two


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def running(bundles, cores, gate):
    bundle = bundles("shapes", **SHAPES_OPTIONS)
    with serve([bundle], lambda service: wrap(service, gate), max_batch=1) as running, ThreadPoolExecutor(4) as pool:
        yield SimpleNamespace(
            post=lambda seed: pool.submit(running.post, {"prompt": "x", "seed": seed, "size": "32x32"}),
            service=running.service,
        )
        gate.open.set()


def places(gate: Gate, held: int) -> list[list[int]]:
    """The cores of each lane, once `held` batches were taken."""
    wait_until(lambda: gate.held == held)
    lanes = [thread for thread in threading.enumerate() if thread.name == "arcflow-lane"]
    return sorted(sorted(os.sched_getaffinity(lane.native_id)) for lane in lanes)


def test_lanes_stay_on_cores_of_their_own_while_all_are_busy(running, cores, gate):
    first = running.post(1)
    assert places(gate, 1) == [EVERYWHERE, EVERYWHERE]
    waiting = [running.post(i) for i in (2, 3)]
    assert sorted(places(gate, 2), key=len) in [[[core], EVERYWHERE] for core in cores]
    gate.open.set()
    replies = [future.result() for future in (first, *waiting)]
    gate.open.clear()
    alone = running.post(4)
    wait_until(lambda: gate.held == 4)
    assert cores in places(gate, 4)
    gate.open.set()
    assert [len(images_of(reply)) for reply in (*replies, alone.result())] == [1] * 4


def test_a_lane_that_hangs_leaves_the_others_all_cores(running, gate):
    running.service._lanes.lost = 1
    waiting = [running.post(i) for i in (1, 2)]
    assert places(gate, 2) == [EVERYWHERE, EVERYWHERE]
    gate.open.set()
    assert all(images_of(future.result()) for future in waiting)


def test_a_system_that_refuses_is_left_alone(running, gate, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    waiting = [running.post(i) for i in (1, 2)]
    assert places(gate, 2) == [EVERYWHERE, EVERYWHERE]
    gate.open.set()
    assert all(images_of(future.result()) for future in waiting)
    assert [r.message for r in caplog.records] == ["lanes are not kept on cores of their own: not allowed"]


@pytest.mark.parametrize(
    ("given", "own"),
    [({}, True), ({"lanes": 1}, False), ({"lanes": 1, "threads": 1}, False), ({"backend": "tensorrt"}, False)],
)
def test_only_lanes_that_fill_the_cores_have_their_own(cores, given, own):
    assert Settings(**given).lane_cores == (cores if own else [])
