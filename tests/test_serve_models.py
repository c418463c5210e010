"""Loading bundles for the service: sizes that are generated before it is ready."""

from __future__ import annotations

import pytest

from arcflow_runtime import Pipeline, cli
from arcflow_runtime.errors import RequestError
from arcflow_serve.models import open_models
from arcflow_serve.settings import Settings
from tests.conftest import SHAPES_OPTIONS


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the batches that are generated: number of prompts, height and width."""
    found, call = [], Pipeline.__call__

    def record(self, prompt, height=None, width=None, **options):
        found.append((len(prompt), height, width))
        return call(self, prompt, height, width, **options)

    monkeypatch.setattr(Pipeline, "__call__", record)
    return found


@pytest.fixture
def start(bundles):
    """A function (settings) -> the model of the shapes bundle, loaded."""
    opened = []

    def start(**settings):
        (model,) = open_models([bundles("shapes", **SHAPES_OPTIONS)], Settings(threads=1, **settings)).values()
        opened.append(model)
        return model

    yield start
    for model in opened:
        model.close()


def test_sizes_are_generated_in_every_batch_size_before_the_model_is_there(start, calls, monkeypatch):
    graphs, warm_up = [], Pipeline.warm_up

    def record(self, shapes):
        graphs.extend(shapes)
        warm_up(self, shapes)

    monkeypatch.setattr(Pipeline, "warm_up", record)
    model = start(warm_up=((32, 16), (16, 16)), max_batch=2)
    assert calls == [(1, 16, 32), (2, 16, 32), (1, 16, 16), (2, 16, 16)]
    assert graphs == calls
    # Also after an engine has failed.
    del calls[:]
    for _ in range(3):
        model.failed(for_memory=False)
    assert not model.loaded and not calls
    model.restore()
    assert model.loaded and len(calls) == 4


def test_nothing_is_generated_unless_it_is_asked_for(start, calls):
    start()
    assert calls == []


def test_a_size_that_the_bundle_does_not_have(start):
    with pytest.raises(RequestError, match=r"^width must be a multiple of 16, got 17; the nearest is 16$"):
        start(warm_up=((17, 16),))


@pytest.mark.parametrize("size", ["64", "0x64", "64x64x3"])
def test_sizes_that_are_none(size, capsys):
    assert cli.main(["serve", "bundle", "--warm-up", size]) == 2
    assert f"--warm-up: must be WIDTHxHEIGHT in pixels such as 1024x768, got '{size}'" in capsys.readouterr().err
