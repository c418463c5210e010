"""What goes wrong in a service: engines that fail, hang or run out of memory, clients that leave, a full queue."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from arcflow_runtime import EngineError, Pipeline
from arcflow_runtime.gpu.lane import OutOfDeviceMemory
from tests.conftest import SHAPES_OPTIONS
from tests.serving import GENERATE, Gate, alone, image_of, images_of, serve, wait_until, wrap

SIZE = {"width": 32, "height": 32}


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles("shapes", **SHAPES_OPTIONS)


@pytest.fixture(scope="module")
def pipe(bundle):
    with Pipeline.load(bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture
def open_service(bundle):
    """A function (before, settings) -> a context with a service whose pipelines call `before`."""

    def start(before, **settings):
        return serve([bundle], lambda service: wrap(service, before), **settings)

    return start


def body(prompt: str, seed: int = 1, **others) -> dict:
    return {"prompt": prompt, "seed": seed, "size": "32x32"} | others


def is_right(response: httpx2.Response, pipe: Pipeline, prompt: str, seed: int = 1) -> bool:
    return images_of(response)[0].tobytes() == alone(pipe, prompt, seed, **SIZE)


def at_once(running, bodies: list[dict], meanwhile=lambda: None) -> list[httpx2.Response]:
    """Post all bodies at the same time, call `meanwhile` and return the responses."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(running.post, b) for b in bodies]
        meanwhile()
        return [f.result() for f in futures]


def running_and_waiting(running) -> tuple[float, float]:
    return running.metric("arcflow_requests_running"), running.metric("arcflow_requests_waiting")


# Engines that fail


def test_a_poisoned_request_fails_alone(open_service, pipe, caplog):
    gate = Gate()

    def before(prompts):
        gate(prompts)
        if "poison" in prompts:
            raise EngineError("backbone: latents of images [0] must be finite, got NaN or Inf")

    with open_service(before, lanes=1) as running:

        def meanwhile():
            wait_until(lambda: running_and_waiting(running) == (1, 5))
            gate.open.set()

        prompts = ["first", "a", "poison", "b", "c", "d"]

        def post_in_order():
            # The first holds the only lane, so that the others are in one batch.
            with ThreadPoolExecutor(len(prompts)) as pool:
                futures = [pool.submit(running.post, body(prompts[0]))]
                wait_until(lambda: gate.held == 1)
                futures += [pool.submit(running.post, body(p)) for p in prompts[1:]]
                meanwhile()
                return [f.result() for f in futures]

        responses = post_in_order()
        assert sorted(gate.batches[1]) == sorted(prompts[1:])
        for prompt, response in zip(prompts, responses, strict=True):
            if prompt == "poison":
                assert response.status_code == 500
                assert response.headers["x-should-retry"] == "false"
                # Who runs the service finds the failure by the id that the client was given.
                sentence = "backbone: latents of images [0] must be finite, got NaN or Inf"
                logged = f"request {response.headers['x-request-id']} failed with engine_failed: {sentence}"
                assert logged in [record.getMessage() for record in caplog.records]
                assert response.json()["error"] == {
                    "message": "backbone: latents of images [0] must be finite, got NaN or Inf",
                    "type": "server_error",
                    "param": None,
                    "code": "engine_failed",
                }
            else:
                assert is_right(response, pipe, prompt)
        assert is_right(running.post(body("after")), pipe, "after")
        assert running.metric("arcflow_requests_total", status="500") == 1
        assert running.metric("arcflow_requests_total", status="200") == 6


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        EngineError("backbone: ONNX Runtime failed: Failed to allocate memory for requested buffer"),
        OutOfDeviceMemory("backbone: activations need 5 bytes of a GPU's memory, 3 are free"),
    ],
    ids=["python", "engine", "GPU"],
)
def test_memory_runs_out_for_one_request(open_service, pipe, error):
    def before(prompts):
        if "large" in prompts:
            raise error

    with open_service(before) as running:
        response = running.post(body("large"))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "out_of_memory"
        assert is_right(running.post(body("after")), pipe, "after")
        # A client whose images are too large cannot have the bundle loaded again and again.
        (model,) = running.service.models.values()
        loaded = model._pipeline
        for _ in range(4):
            assert running.post(body("large")).status_code == 503
        assert model._pipeline is loaded


def test_batches_that_do_not_fit_become_smaller(open_service, pipe):
    gate, sizes = Gate(), []

    def before(prompts):
        gate(prompts)
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise MemoryError

    with open_service(before, lanes=1) as running:
        for _ in range(3):
            gate.open.clear()
            held = gate.held

            def meanwhile(held=held):
                wait_until(lambda: gate.held > held and sum(running_and_waiting(running)) == 9)
                gate.open.set()

            prompts = [f"prompt {i}" for i in range(9)]
            responses = at_once(running, [body(p) for p in prompts], meanwhile)
            assert all(is_right(r, pipe, p) for r, p in zip(responses, prompts, strict=True))
        # The first batch that does not fit has 3 to 8, and the next at most half of it: 4 fails too, and then it is 2.
        assert 1 <= len([n for n in sizes if n > 2]) <= 2
        assert max(sizes[-9:]) <= 2


def test_an_exception_that_ends_threads_does_not_end_a_lane(open_service, pipe):
    def before(prompts):
        if "exit" in prompts:
            raise SystemExit(3)

    with open_service(before, lanes=1) as running:
        assert running.post(body("exit")).status_code == 500
        assert is_right(running.post(body("after")), pipe, "after")
        assert running.metric("arcflow_lanes") == 1
        assert running.metric("arcflow_lanes_lost") == 0


def test_an_engine_that_keeps_failing_is_loaded_again(open_service, pipe):
    broken, loads = threading.Event(), []
    broken.set()

    def before(prompts):
        if broken.is_set():
            raise EngineError("backbone: the engine is damaged")

    with open_service(before) as running:
        (model,) = running.service.models.values()
        load = model._load

        def count():
            broken.clear()
            loads.append(1)
            return load()

        model._load = count
        for _ in range(3):
            assert running.post(body("x")).status_code == 500
        assert is_right(running.post(body("x")), pipe, "x")
        assert len(loads) == 1


@pytest.mark.parametrize("error", [EngineError, RuntimeError])
def test_a_bundle_that_cannot_be_loaded_again(open_service, pipe, monkeypatch, error):
    monkeypatch.setattr("arcflow_serve.models.RETRY_S", 0.05)
    damaged = threading.Event()
    damaged.set()

    def before(prompts):
        if damaged.is_set():
            raise EngineError("backbone: the engine is damaged")

    with open_service(before) as running, running.client() as client:
        (model,) = running.service.models.values()
        load = model._load

        def fail():
            if damaged.is_set():
                raise error("backbone cannot be loaded")
            return load()

        model._load = fail
        for _ in range(3):
            running.post(body("x"))
        wait_until(lambda: client.get("/health").status_code == 503)
        reason = f"model {model.name!r} cannot be loaded: backbone cannot be loaded"
        assert client.get("/health").json() == {"status": "failing", "reasons": [reason]}
        assert client.get("/ready").json()["status"] == "not ready"
        response = running.post(body("x"))
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"] == {
            "message": f"model {model.name!r} cannot be used now: backbone cannot be loaded; try again later",
            "type": "server_error",
            "param": None,
            "code": "model_unavailable",
        }
        damaged.clear()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert client.get("/health").json() == {"status": "ok", "reasons": []}
        assert is_right(running.post(body("x")), pipe, "x")


def stop_loading(model, over: threading.Event) -> None:
    """Let a model be loaded again, which waits for `over`."""
    load = model._load

    def wait():
        over.wait()
        return load()

    model._load = wait
    for _ in range(3):
        model.failed(for_memory=False)
    wait_until(lambda: model.loading_s > 0)


def test_a_load_that_hangs_stops_nothing_else(bundle, pipe, tmp_path):
    other, over = tmp_path / "other", threading.Event()
    other.symlink_to(bundle)
    with serve([bundle, other], deadline_s=2.0) as running, running.client() as client:
        first, second = running.service.models.values()
        stop_loading(first, over)
        assert client.get("/ready").json()["reasons"] == [f"model {first.name!r} is being loaded"]
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(running.post, body("x", model=first.name)) for _ in range(4)]
            wait_until(lambda: running_and_waiting(running) == (0, 4))
            # No lane waits for the bundle, and those that wait for it have a deadline.
            assert is_right(running.post(body("x", model=second.name)), pipe, "x")
            codes = [future.result().json()["error"]["code"] for future in futures]
        assert codes == ["deadline_exceeded"] * 4
        assert client.get("/health").status_code == 200
        first._loading_since -= 600
        seconds = round(600 + first.first_load_s)
        reason = f"model {first.name!r} has been loading for more than {seconds} s"
        assert client.get("/health").json()["reasons"] == [reason]
        over.set()
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert is_right(running.post(body("x", model=first.name)), pipe, "x")


def test_requests_wait_until_their_bundle_is_loaded_again(bundle, pipe):
    over = threading.Event()
    with serve([bundle]) as running, ThreadPoolExecutor(3) as pool:
        (model,) = running.service.models.values()
        stop_loading(model, over)
        futures = [pool.submit(running.post, body("x", seed=i)) for i in range(3)]
        wait_until(lambda: running_and_waiting(running) == (0, 3))
        over.set()
        assert all(is_right(future.result(), pipe, "x", seed=i) for i, future in enumerate(futures))


def test_a_load_that_hangs_does_not_keep_the_service_from_ending(bundle):
    over = threading.Event()
    with serve([bundle]) as running:
        (model,) = running.service.models.values()
        stop_loading(model, over)
    over.set()
    wait_until(lambda: "arcflow-load" not in [thread.name for thread in threading.enumerate()])
    # What was loaded too late has been closed.
    assert not model.loaded


@pytest.mark.slow
def test_an_engine_that_hangs(open_service, pipe):
    over = threading.Event()

    def before(prompts):
        if "hang" in prompts:
            over.wait()

    with open_service(before, lanes=1, hang_timeout_s=3.0) as running, running.client() as client:
        for lost in (1, 2):
            response = running.post(body("hang"))
            assert response.status_code == 500
            assert response.json()["error"] == {
                "message": "generating the image took more than 3 s and was given up; ask for a smaller image or "
                "fewer steps, or start the service with a larger --hang-timeout",
                "type": "server_error",
                "param": None,
                "code": "engine_hangs",
            }
            assert is_right(running.post(body("after")), pipe, "after")
            assert running.metric("arcflow_lanes_lost") == lost
            assert client.get("/health").status_code == 200
        running.post(body("hang"))
        assert client.get("/health").json() == {
            "status": "failing",
            "reasons": ["3 lanes did not return from an engine, more than 2"],
        }
        # It still does what it can.
        assert is_right(running.post(body("after")), pipe, "after")
        over.set()
        # A call that returns after all is answered no second time, and its lane ends.
        wait_until(lambda: sum(t.name == "arcflow-lane" for t in threading.enumerate()) == 1)
        assert is_right(running.post(body("after")), pipe, "after")


def test_an_engine_that_hangs_while_another_lane_fails(open_service, pipe):
    """The bundle is loaded again once the call that hangs is given up; nobody waits for it for ever."""
    over, broken = threading.Event(), threading.Event()
    broken.set()

    def before(prompts):
        if "hang" in prompts:
            over.wait()
        if "fail" in prompts and broken.is_set():
            raise EngineError("backbone: the engine is damaged")

    with open_service(before, lanes=2, hang_timeout_s=2.0) as running, ThreadPoolExecutor(1) as pool:
        (model,) = running.service.models.values()
        loaded = model._pipeline
        hanging = pool.submit(running.post, body("hang"))
        wait_until(lambda: running.metric("arcflow_lanes_busy") == 1)
        for _ in range(3):
            assert running.post(body("fail")).status_code == 500
        broken.clear()
        assert is_right(running.post(body("fail")), pipe, "fail")
        assert model._pipeline is not loaded
        assert hanging.result().json()["error"]["code"] == "engine_hangs"
        over.set()


def test_a_failure_in_a_stream_is_an_error_of_the_client(open_service):
    done = []

    def before(prompts):
        done.append(prompts)
        if len(done) > 1:
            raise EngineError("backbone: the engine is damaged")

    with (
        open_service(before, lanes=1, max_batch=1) as running,
        openai.OpenAI(api_key="x", base_url=running.url + "/v1", max_retries=0) as client,
    ):
        stream = client.images.generate(prompt="x", n=2, stream=True)
        assert next(stream).type == "image_generation.completed"
        with pytest.raises(openai.APIError, match=r"^backbone: the engine is damaged$"):
            next(stream)
        with pytest.raises(openai.InternalServerError) as error:
            client.images.generate(prompt="x", stream=True)
        assert error.value.code == "engine_failed"


# Clients that leave, and places


def leave(running, prompt: str, padding: int = 0) -> None:
    """Send a request in two parts, the second of them with `padding` spaces; close the connection without reading."""
    data = json.dumps(body(prompt)).encode()
    data += b" " * padding
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        waiting = running.metric("arcflow_requests_waiting")
        connection.sendall(head.encode() + data[:1])
        time.sleep(0.02)
        connection.sendall(data[1:])
        wait_until(lambda: running.metric("arcflow_requests_waiting") == waiting + 1)


def test_who_leaves_frees_its_place_and_disturbs_nobody(open_service, pipe):
    """An aborted request must not abort later ones, however many there were."""
    gate = Gate()
    with open_service(gate, lanes=1) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.post, body("first"))
        wait_until(lambda: gate.held == 1)
        for i in range(20):
            # The second one is so long that uvicorn stops to read.
            leave(running, f"left {i}", padding=100_000 if i == 1 else 0)
            wait_until(lambda: running_and_waiting(running) == (1, 0))
        last = pool.submit(running.post, body("last"))
        wait_until(lambda: running_and_waiting(running) == (1, 1))
        gate.open.set()
        assert is_right(first.result(), pipe, "first")
        assert is_right(last.result(), pipe, "last")
        assert gate.batches == [("first",), ("last",)]
        wait_until(lambda: running.metric("arcflow_requests_left_total") == 20)
        assert running_and_waiting(running) == (0, 0)


def test_who_leaves_a_stream_frees_its_place(open_service, pipe):
    gate = Gate()
    gate.open.set()
    with open_service(gate, lanes=1, max_batch=1) as running:
        with (
            running.client() as client,
            client.stream("POST", GENERATE, json=body("left", n=3, stream=True)) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data:"):
                    gate.open.clear()
                    break
        gate.open.set()
        wait_until(lambda: sum(running_and_waiting(running)) == 0)
        assert is_right(running.post(body("after")), pipe, "after")


def test_the_gauges_say_what_waits(open_service):
    """Nine requests wait behind two, and the gauges say so (a server's gauge stayed 0)."""
    gate = Gate()
    with open_service(gate, max_batch=1) as running:
        seen = []

        def meanwhile():
            wait_until(lambda: sum(running_and_waiting(running)) == 11)
            seen.append(running_and_waiting(running))
            seen.append(running.metric("arcflow_images_waiting"))
            seen.append(running.metric("arcflow_lanes_busy"))
            gate.open.set()

        responses = at_once(running, [body(f"{i}") for i in range(11)], meanwhile)
        assert seen == [(2, 9), 9, 2]
        assert {r.status_code for r in responses} == {200}
        wait_until(lambda: running_and_waiting(running) == (0, 0))
        assert running.metric("arcflow_requests_total", status="200") == 11
        assert running.metric("arcflow_e2e_latency_seconds_count") == 11
        assert running.metric("arcflow_queue_seconds_count") == 11
        assert running.metric("arcflow_batch_size_count") == 11
        assert running.metric("arcflow_batch_size_sum") == 11


def test_concurrent_requests_are_batched(open_service, pipe):
    """They are not served one by one, and each has the image of its seed."""
    gate = Gate()
    with open_service(gate, lanes=1) as running:

        def meanwhile():
            wait_until(lambda: sum(running_and_waiting(running)) == 9)
            gate.open.set()

        responses = at_once(running, [body(f"p{i}", seed=i) for i in range(9)], meanwhile)
        # What had come when the lane became free, and the rest.
        assert len(gate.batches) == 2
        assert sum(map(len, gate.batches)) == 9
        for i, response in enumerate(responses):
            assert is_right(response, pipe, f"p{i}", i)
            assert response.json()["data"][0]["batch_size"] in map(len, gate.batches)


def test_a_full_queue(open_service, pipe):
    gate = Gate()
    with (
        open_service(gate, lanes=1, max_batch=1, max_queue=2, max_n=2) as running,
        openai.OpenAI(api_key="x", base_url=running.url + "/v1") as client,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(running.post, body("first"))
        wait_until(lambda: gate.held == 1)
        second = pool.submit(running.post, body("second", n=2))
        wait_until(lambda: running.metric("arcflow_images_waiting") == 2)
        with pytest.raises(openai.RateLimitError) as error:
            client.with_options(max_retries=0).images.generate(prompt="x")
        assert error.value.code == "queue_full"
        assert error.value.type == "rate_limit_error"
        assert error.value.response.headers["retry-after"] == "1"
        assert error.value.body["message"] == (
            "2 images may wait at most, and there is no room for this request; try again later"
        )
        # The client tries again by itself after that second.
        third = pool.submit(client.images.generate, prompt="third", size="32x32", extra_body={"seed": 1})
        wait_until(lambda: running.metric("arcflow_requests_total", status="429") == 2)
        gate.open.set()
        assert is_right(first.result(), pipe, "first")
        assert len(images_of(second.result())) == 2
        assert image_of(third.result().data[0].b64_json).tobytes() == alone(pipe, "third", 1, **SIZE)


def test_a_request_that_waits_too_long(open_service, pipe):
    gate = Gate()
    with open_service(gate, lanes=1, max_batch=1, deadline_s=0.3) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.post, body("first"))
        wait_until(lambda: gate.held == 1)
        late = running.post(body("late"))
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert late.json()["error"]["message"] == (
            "the request waited for 0.3 s without being started; try again later"
        )
        gate.open.set()
        # What was started is finished.
        assert is_right(first.result(), pipe, "first")
        assert gate.batches == [("first",)]


def test_a_client_that_floods_does_not_shut_out_another(bundle):
    """Keys tell clients apart; the second one's requests come after at most one of the first's."""
    gate, keys = Gate(), ("first-client-0001", "second-client-0002")
    with (
        serve([bundle], lambda s: wrap(s, gate), lanes=1, max_batch=1, max_queue=8, max_n=1, api_keys=keys) as running,
        ThreadPoolExecutor(12) as pool,
    ):

        def post(key, prompt):
            return running.post(body(prompt), headers={"authorization": f"Bearer {key}"})

        flood = [pool.submit(post, keys[0], "flood")]
        wait_until(lambda: gate.held == 1)
        flood += [pool.submit(post, keys[0], "flood") for _ in range(8)]
        wait_until(lambda: running.metric("arcflow_images_waiting") == 8)
        others = [pool.submit(post, keys[1], f"other {i}") for i in range(2)]
        wait_until(lambda: running.metric("arcflow_requests_total", status="429") == 2)
        gate.open.set()
        assert [f.result().status_code for f in others] == [200, 200]
        assert sorted(f.result().status_code for f in flood) == [200] * 7 + [429] * 2
        places = [i for i, batch in enumerate(gate.batches) if batch[0].startswith("other")]
        assert places[0] <= 2
        assert places[1] <= 4


def test_loras_are_passed_on(open_service):
    """Only names that the service has are taken, and the scales of a batch are those of its requests."""
    calls = []
    with open_service(lambda prompts: None, lanes=1) as running:
        (model,) = running.service.models.values()
        model.loras = ("ink", "wool")
        wrapped = model._pipeline

        class WithLoras:
            def __call__(self, prompts, loras=None, **arguments):
                calls.append((tuple(prompts), loras))
                return wrapped(prompts, **arguments)

            def __getattr__(self, name):
                return getattr(wrapped, name)

        model._pipeline = WithLoras()
        assert running.post(body("a", loras={"wool": 0.5, "ink": 1})).status_code == 200
        assert running.post(body("b")).status_code == 200
        assert calls == [(("a",), {"ink": 1.0, "wool": 0.5}), (("b",), None)]
        refused = running.post(body("c", loras={"ink": 1, "other": 1}))
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == (
            "loras must name LoRAs that this service has loaded, got 'other'; it has 'ink', 'wool'. "
            "A LoRA can also be merged into a bundle, with arcflow export --lora"
        )
        with running.client() as client:
            assert client.get("/v1/models").json()["data"][0]["arcflow"]["loras"] == ["ink", "wool"]


def test_no_thread_is_left(bundle):
    before = set(threading.enumerate())
    with serve([bundle]) as running:
        assert running.post(body("x")).status_code == 200
    wait_until(lambda: {t for t in threading.enumerate() if t.name.startswith("arcflow")} <= before)


def test_the_reply_has_the_time_in_the_queue(open_service):
    gate = Gate()
    with open_service(gate, lanes=1, max_batch=1) as running, ThreadPoolExecutor(2) as pool:
        pool.submit(running.post, body("first"))
        wait_until(lambda: gate.held == 1)
        second = pool.submit(running.post, body("second"))
        wait_until(lambda: running_and_waiting(running) == (1, 1))
        time.sleep(0.1)
        gate.open.set()
        (image,) = second.result().json()["data"]
        assert image["timings_ms"]["queue"] >= 100
        assert base64.b64decode(image["b64_json"])
