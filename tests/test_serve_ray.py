"""The service on Ray Serve, run for real: two replicas of which one is killed, limits, and its arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest

from arcflow_runtime import Pipeline
from tests.conftest import SHAPES_OPTIONS
from tests.servers import ROOT, processes_of, python_of, started
from tests.serving import GENERATE, alone, image_of, sample, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.lengthy]
REQUESTS, CLIENTS, KILL_AFTER = 300, 16, 100
WAIT_S = 300.0
#: A replica takes four requests, and 18 images may wait.
ARGUMENTS = ("lanes=1", "threads=1", "min_replicas=2", "max_replicas=2", "max_batch=2", "max_queue=18")


@pytest.fixture(scope="module")
def python() -> Path:
    return python_of("ray", "ray.serve")


@pytest.fixture(scope="module")
def bundle(bundles) -> Path:
    return bundles("shapes", **SHAPES_OPTIONS)


@pytest.fixture(scope="module")
def ray(python, bundle, tmp_path_factory):
    home = tmp_path_factory.mktemp("ray")
    # More cores than there are: two replicas fit on any machine.
    with started(python, "serve_ray.py", bundle, *ARGUMENTS, "--cpus", 2, home=home) as running:
        wait_until(lambda: httpx2.get(running.url + "/ready").status_code == 200, WAIT_S)
        yield running


def replicas(running) -> list[int]:
    """Process ids of the generators that Ray started for this server."""
    return processes_of(running, b"ServeReplica:default:Generator")


def metric(running, name: str, **labels: str) -> float:
    return sample(httpx2.get(running.url + "/metrics", timeout=WAIT_S).text, name, **labels)


def test_a_replica_is_killed_under_load_and_nothing_is_lost(ray, bundle):
    prompts = ("a red circle", "a large blue heart", "")
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = {(p, s): alone(pipe, p, s) for p in prompts for s in range(REQUESTS // CLIENTS)}
    victims, answered = replicas(ray), Counter()
    assert len(victims) == 2

    def ask(number: int) -> str:
        prompt, seed = prompts[number % 3], number % (REQUESTS // CLIENTS)
        response = httpx2.post(ray.url + GENERATE, json={"prompt": prompt, "seed": seed}, timeout=WAIT_S)
        answered[response.status_code] += 1
        if sum(answered.values()) == KILL_AFTER:
            os.kill(victims[0], signal.SIGKILL)
        if response.status_code != 200:
            return response.text
        pixels = image_of(response.json()["data"][0]["b64_json"]).tobytes()
        return "right" if pixels == expected[prompt, seed] else "wrong"

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert Counter(pool.map(ask, range(REQUESTS))) == {"right": REQUESTS}
    assert metric(ray, "arcflow_requests_total", status="200") >= REQUESTS
    # Ray starts another one in the place of the dead one.
    wait_until(lambda: len(replicas(ray)) == 2 and metric(ray, "arcflow_replicas") == 2, WAIT_S)
    assert victims[0] not in replicas(ray)


def test_openais_client_streams_and_gets_its_exceptions(ray):
    with openai.OpenAI(base_url=ray.url + "/v1", api_key="unused", max_retries=0, timeout=WAIT_S) as client:
        events = list(client.images.generate(prompt="a red circle", stream=True, partial_images=1))
        assert [e.type for e in events] == ["image_generation.partial_image", "image_generation.completed"]
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a red circle", size="17x16")
    assert refused.value.body["message"] == "width must be a multiple of 16, got 17; the nearest is 16"
    # One id, which Ray's logs have too.
    assert len(refused.value.response.headers.get_list("x-request-id")) == 1


def test_more_than_may_wait_is_refused_as_openai_words_it(ray):
    body = {"prompt": "a red circle", "num_inference_steps": 50}

    def ask(seed: int) -> httpx2.Response:
        return httpx2.post(ray.url + GENERATE, json=body | {"seed": seed}, timeout=WAIT_S)

    with ThreadPoolExecutor(64) as pool:
        responses = list(pool.map(ask, range(64)))
    assert {r.status_code for r in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "queue_full"
            assert response.headers["retry-after"] == "2"


def test_who_leaves_gives_up_its_work(ray):
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(ray.url + GENERATE, json={"prompt": "x", "n": 10, "num_inference_steps": 50}, timeout=0.2)
    wait_until(lambda: metric(ray, "arcflow_requests_left_total") >= 1, WAIT_S)
    assert metric(ray, "arcflow_requests_running") == metric(ray, "arcflow_requests_waiting") == 0


BUILD = """
import json, sys
from arcflow_runtime.errors import RequestError
from arcflow_serve.ray import application
found = []
for arguments in json.load(sys.stdin):
    try:
        generator = application(arguments)._bound_deployment.init_args[0]._bound_deployment
    except RequestError as e:
        found.append(str(e))
    else:
        scaling = generator._deployment_config.autoscaling_config
        (bundles, settings) = generator.init_args
        found.append([generator.ray_actor_options, generator.max_ongoing_requests, scaling.min_replicas,
            scaling.max_replicas, scaling.target_ongoing_requests, [str(path) for path in bundles],
            [str(path) for path in settings.loras], settings.warm_up])
print(json.dumps(found))
"""


def test_arguments(python):
    shapes = {"bundle": "shapes", "lanes": "1", "threads": "1"}
    gpu = {"bundle": ["models", "owner/b"], "backend": "tensorrt-rtx", "lanes": 2, "max_batch": 4, "max_replicas": "8"}
    cases = [
        (shapes, [{"num_cpus": 1}, 16, 1, 1, 8, ["shapes"], [], []]),
        # Text from `serve run`, and lists from a YAML file.
        (
            shapes | {"loras": "ink", "warm_up": "64x48"},
            [{"num_cpus": 1}, 16, 1, 1, 8, ["shapes"], [str(ROOT / "ink")], [[64, 48]]],
        ),
        (
            gpu | {"loras": ["ink", "/oil"], "warm_up": ["64x48", "16x16"]},
            [
                *({"num_cpus": 1, "num_gpus": 1}, 16, 1, 8, 8, [str(ROOT / "models"), "owner/b"]),
                *([str(ROOT / "ink"), "/oil"], [[64, 48], [16, 16]]),
            ],
        ),
        (shapes | {"warm_up": "64"}, "warm_up must be WIDTHxHEIGHT in pixels such as 1024x768, got '64'"),
        ({}, "bundle must be the path of a bundle, or a list of paths; got none"),
        (shapes | {"lane": 2}, "unknown argument 'lane' of arcflow_serve.ray:application; did you mean lanes?"),
        (shapes | {"lanes": "two"}, "lanes must be a valid integer, unable to parse string as an integer, got 'two'"),
        (shapes | {"min_replicas": 2}, "min_replicas must be from 1 to max_replicas, got 2 and 1"),
        (shapes | {"ingress_replicas": 0}, "ingress_replicas must be at least 1, got 0"),
        (
            shapes | {"backend": "auto"},
            "backend must be named, got 'auto': whether a replica needs a GPU is decided before there is a replica",
        ),
    ]
    asked = json.dumps([arguments for arguments, _ in cases])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "-c", BUILD]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected for _, expected in cases]


CHECK = """
import sys, yaml
from ray.serve.schema import ServeDeploySchema
from arcflow_serve.ray import application
(app,) = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1]))).applications
module, name = app.import_path.split(":")
assert (module, getattr(sys.modules[module], name)) == ("arcflow_serve.ray", application)
print(application(app.args)._bound_deployment.init_args[0]._bound_deployment.ray_actor_options)
"""


def test_the_file_to_deploy(python):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    line = [python, "-c", CHECK, ROOT / "serving" / "ray.yaml"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "{'num_cpus': 1, 'num_gpus': 1}\n"), done.stderr
