"""Guidance by a negative prompt in the service: fields, batches, partial images, and what other bundles refuse."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_bundle import make_bundle

from arcflow_runtime import Pipeline
from arcflow_runtime.disk.bundle import Bundle
from arcflow_serve import models
from tests.serving import Gate, alone, image_of, images_of, preview_alone, serve, wait_until, wrap
from tests.test_straight_runtime import Backend, make_straight

SIZE = {"height": 32, "width": 48}
ASKED = {"prompt": "a bird", "size": "48x32", "seed": 7}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A bundle of each kind: guided by a negative prompt, by guidance_scale, and of a student."""
    folder = tmp_path_factory.mktemp("guidance")
    made = {"qwen": ("qwen-image",), "flux": ("flux",)}
    return {name: make_straight(folder / name, *kind) for name, kind in made.items()} | {
        "student": make_bundle(folder / "student", "qwen-image")
    }


@pytest.fixture(scope="module")
def running(roots):
    with pytest.MonkeyPatch.context() as patch:
        load = lambda path, *_, **__: Pipeline(Bundle.open(path), Backend())  # noqa: E731
        patch.setattr(models.Pipeline, "load", staticmethod(load))
        with serve(list(roots.values())) as running:
            yield running


@pytest.fixture(scope="module")
def pipe(roots):
    return Pipeline(Bundle.open(roots["qwen"]), Backend())


def test_a_guided_image_is_that_of_the_pipeline(running, pipe):
    reply = running.post(ASKED | {"negative_prompt": "blurred", "true_cfg_scale": 3})
    (image,) = images_of(reply)
    assert image.tobytes() == alone(pipe, "a bird", 7, negative_prompt="blurred", true_cfg_scale=3.0, **SIZE)
    assert image.tobytes() != alone(pipe, "a bird", 7, **SIZE)
    assert image.text["negative_prompt"] == "blurred" and image.text["true_cfg_scale"] == "3"
    body = reply.json()
    assert (body["true_cfg_scale"], body["warnings"]) == (3.0, [])
    # The tokens of both texts are counted.
    counts = [running.post(ASKED | {"prompt": p}).json()["usage"]["input_tokens"] for p in ("a bird", "blurred")]
    assert body["usage"]["input_tokens"] == sum(counts)


def test_without_a_negative_prompt_the_reply_says_so(running, pipe):
    reply = running.post(ASKED)
    assert images_of(reply)[0].tobytes() == alone(pipe, "a bird", 7, **SIZE)
    assert reply.json()["true_cfg_scale"] is None
    assert reply.json()["warnings"] == [
        "without a negative_prompt the images are not guided; give negative_prompt=' ' to guide them"
    ]
    reply = running.post(ASKED | {"negative_prompt": "blurred", "true_cfg_scale": 1})
    assert images_of(reply)[0].tobytes() == alone(pipe, "a bird", 7, **SIZE)
    assert reply.json()["warnings"] == ["true_cfg_scale 1 does not guide, so negative_prompt was ignored"]


def test_requests_of_one_scale_share_a_batch_whatever_their_negative_prompts(roots, running, pipe):
    """And each image is the one that it is alone, bit for bit."""
    negatives = [" ", "blurred", None, "ugly and much longer than the others", "blurred", None]
    scales = [None, 4, None, 4.0, 2.5, None]
    gate = Gate()
    with serve([roots["qwen"]], lambda service: wrap(service, gate), lanes=1) as busy, ThreadPoolExecutor(8) as pool:
        first = pool.submit(busy.post, ASKED | {"prompt": "first"})
        wait_until(lambda: gate.held == 1)
        bodies = [
            {"prompt": f"bird {i}", "size": "48x32", "seed": i, "negative_prompt": n, "true_cfg_scale": s}
            for i, (n, s) in enumerate(zip(negatives, scales, strict=True))
        ]
        sent = [pool.submit(busy.post, body) for body in bodies]
        wait_until(lambda: busy.metric("arcflow_images_waiting") == len(bodies))
        gate.open.set()
        replies = [done.result() for done in sent]
        assert first.result().status_code == 200
    batches = {frozenset(prompts) for prompts in gate.batches}
    assert batches == {
        frozenset(f"bird {i}" for i in group) if group else frozenset({"first"})
        for group in ((), (0, 1, 3), (2, 5), (4,))
    }
    for i, (reply, negative, scale) in enumerate(zip(replies, negatives, scales, strict=True)):
        expected = alone(pipe, f"bird {i}", i, negative_prompt=negative, true_cfg_scale=scale, **SIZE)
        assert images_of(reply)[0].tobytes() == expected


def test_partial_images_are_spread_over_the_steps(running, pipe):
    """One of eight steps comes after the fourth: the latents less sigma times the guided velocity."""
    guided = {"negative_prompt": "blurred", "num_inference_steps": 8}
    body = ASKED | guided | {"stream": True, "partial_images": 1}
    events = [json.loads(x.removeprefix("data: ")) for x in running.post(body).text.split("\n") if x[:6] == "data: "]
    assert [e["type"] for e in events] == ["image_generation.partial_image", "image_generation.completed"]
    partial, completed = (image_of(e["b64_json"]).tobytes() for e in events)
    assert partial == preview_alone(pipe, "a bird", 7, max_previews=1, **guided, **SIZE)
    every = []
    pipe(["a bird"], seed=[7], callback_on_preview=lambda _, x: every.append(x[0].tobytes()), **guided, **SIZE)
    assert partial == every[3] and partial not in (every[2], every[4])
    assert completed == alone(pipe, "a bird", 7, **guided, **SIZE)


@pytest.mark.parametrize("name", ["negative_prompt", "true_cfg_scale"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("flux", "this model is guided by guidance_scale or not at all; leave it out"),
        ("student", "the student is distilled to run once per step, without a negative prompt; leave it out"),
    ],
)
def test_other_bundles_refuse_it(running, model, reason, name):
    reply = running.post(ASKED | {"model": model, name: {"negative_prompt": "x", "true_cfg_scale": 4}[name]})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["message"], error["param"]) == (f"{name} is not supported: {reason}", name)


def test_values_that_are_refused(running):
    for name, value, sentence in (
        ("true_cfg_scale", 66, "true_cfg_scale must be between 0 and 65, got 66.0"),
        ("true_cfg_scale", "4", "true_cfg_scale must be a valid number, got '4'"),
        ("negative_prompt", ["x"], "negative_prompt must be a valid string, got a list with 1 entries"),
        ("negative_prompt", "x" * 4001, "negative_prompt must have at most 4000 characters, got 4001"),
    ):
        error = running.post(ASKED | {name: value}).json()["error"]
        assert (error["message"], error["param"]) == (sentence, name)


def test_models_say_which_are_guided(running):
    with running.client() as client:
        found = {m["id"]: m["arcflow"]["true_cfg_scale"] for m in client.get("/v1/models").json()["data"]}
    assert found == {"qwen": 4.0, "flux": None, "student": None}
