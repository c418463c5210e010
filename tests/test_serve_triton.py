"""`arcflow triton`: what it writes, and its model in a real Triton server over HTTP and gRPC."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType, SimpleNamespace

import httpx2
import numpy as np
import pytest

from arcflow_runtime import Bundle, EngineError, Pipeline, cli
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.errors import LoraError, RequestError
from arcflow_serve import settings
from arcflow_serve.triton_repository import TritonOptions, write_repository
from tests.conftest import SHAPES_OPTIONS
from tests.fake_bundle import make_bundle
from tests.lora_slots import add_slots, write_lora
from tests.servers import processes_of, python_of, started
from tests.serving import alone, wait_until

QUEUE = 24


@pytest.fixture(scope="module")
def bundle(bundles) -> Path:
    return bundles("shapes", **SHAPES_OPTIONS)


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(settings, "cores", lambda: 8)


def test_the_command(bundle, tmp_path, capsys, cores):
    out = tmp_path / "new" / "repository"
    assert cli.main(["triton", str(bundle), "--out", str(out), "--name", "shapes", "--max-batch", "4"]) == 0
    folder = out / "shapes"
    assert capsys.readouterr().out == f"{folder}; start it with: tritonserver --model-repository {out}\n"
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["shapes/1/model.py", "shapes/config.pbtxt"]
    config = (folder / "config.pbtxt").read_text()
    for line in (
        'name: "shapes"',
        "max_batch_size: 4",
        "    max_queue_size: 64",
        "    default_timeout_microseconds: 600000000",
        "instance_group [ { count: 2 kind: KIND_CPU } ]",
        f'parameters {{ key: "bundle" value {{ string_value: "{bundle}" }} }}',
        'parameters { key: "threads" value { string_value: "4" } }',
    ):
        assert line in config.splitlines()
    # A second model of another name is added; the same name is refused.
    assert cli.main(["triton", str(bundle), "--out", str(out), "--name", "other"]) == 0
    capsys.readouterr()
    assert cli.main(["triton", str(bundle), "--out", str(out), "--name", "other"]) == 2
    assert capsys.readouterr().err == (
        f"arcflow triton: error: {out} must have no model 'other' yet; remove {out / 'other'}, "
        "or choose another --name\n"
    )


def test_for_a_gpu_of_another_machine(bundle, tmp_path):
    options = TritonOptions("tensorrt-rtx", bundle_path='/bundles/a "b" ä')
    config = (write_repository(bundle, tmp_path, "shapes", options) / "config.pbtxt").read_text()
    assert "instance_group [ { count: 1 kind: KIND_GPU } ]" in config
    assert 'string_value: "/bundles/a \\"b\\" ä"' in config
    assert "threads" not in config


def test_loras_of_the_configuration(tmp_path):
    root = add_slots(make_bundle(tmp_path / "bundle"), {"backbone": {"transformer_blocks.0.attn.to_q": (8, 8)}})
    file = write_lora(tmp_path / "ink.safetensors", Bundle.open(root).manifest.slots())
    for options, path in (({}, file), ({"lora_folder": "/loras"}, "/loras/ink.safetensors")):
        chosen = TritonOptions("tensorrt-rtx", loras=(file,), **options)
        config = write_repository(root, tmp_path / path.__class__.__name__, None, chosen) / "config.pbtxt"
        assert f'parameters {{ key: "loras" value {{ string_value: "[\\"{path}\\"]" }} }}' in config.read_text()
    with pytest.raises(RequestError, match=r"^--lora needs a bundle with LoRA slots, and none has any; export with "):
        write_repository(make_bundle(tmp_path / "b"), tmp_path / "r", None, TritonOptions("tensorrt", loras=(file,)))
    other = write_lora(
        tmp_path / "other.safetensors",
        {"backbone": b.LoraSlots({"transformer_blocks.0.attn.to_k": b.SlotLayer(8, 8, "float32")}, 8, 8)},
    )
    with pytest.raises(LoraError):
        write_repository(root, tmp_path / "r", None, TritonOptions("tensorrt-rtx", loras=(other,)))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "a/b", "the model's name must be letters, digits, '.', '_' and '-', got 'a/b'; choose one with --name"),
        ({"max_queue": 0}, None, "--max-queue must be at least 1, got 0"),
        ({"deadline_s": float("nan")}, None, "--deadline must be a number of seconds above 0, got nan"),
        (
            {"lora_folder": "/loras"},
            None,
            "--lora-folder needs --lora, which names the files in it; give it, or leave both out",
        ),
        (
            {"backend": "auto"},
            None,
            "--backend must be named, got 'auto': the configuration says whether there is a GPU",
        ),
        (
            {"bundle_path": "a\nb"},
            None,
            "names and paths of a Triton model must be printable, got 'a\\nb'; rename it",
        ),
    ],
)
def test_what_is_refused(bundle, tmp_path, options, name, message):
    with pytest.raises(RequestError) as error:
        write_repository(bundle, tmp_path / "repository", name, TritonOptions(**options))
    assert str(error.value) == message
    assert not (tmp_path / "repository").exists()


class StubTensor:
    """What Triton's stub makes of an input."""

    def __init__(self, name: str, values: list, kind: object) -> None:
        self._name, self._values = name, np.array(values, kind)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


@pytest.fixture
def instance(bundle, monkeypatch):
    """An instance of the model outside a server, where its engines can be made to fail."""
    stub = ModuleType("triton_python_backend_utils")
    stub.TritonError = type("TritonError", (), {"INVALID_ARG": 1, "INTERNAL": 2, "CANCELLED": 3})
    stub.TritonError.__init__ = lambda self, message, code: setattr(self, "said", (message, code))
    stub.InferenceResponse = lambda tensors=None, error=None: error.said if error is not None else dict(tensors)
    stub.Tensor = lambda name, values: (name, values)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.delitem(sys.modules, "arcflow_serve.triton_model", raising=False)
    model = importlib.import_module("arcflow_serve.triton_model").TritonPythonModel()
    parameters = {"bundle": str(bundle), "backend": "onnxruntime", "threads": "1"}
    config = {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    model.initialize({"model_config": json.dumps(config), "model_instance_kind": "CPU"})
    yield model
    model.finalize()
    monkeypatch.delitem(sys.modules, "arcflow_serve.triton_model")


def asked(*prompts: str, **inputs) -> SimpleNamespace:
    tensors = [
        StubTensor("prompt", [p.encode() for p in prompts], object),
        *(StubTensor(name, [64] * len(prompts), np.int32) for name in ("width", "height")),
        StubTensor("seed", range(len(prompts)), np.uint64),
        *(StubTensor(name, [value] * len(prompts), object) for name, value in inputs.items()),
    ]
    return SimpleNamespace(inputs=lambda: tensors, is_cancelled=lambda: False)


def test_images_that_fail_in_a_row_do_not_stop_an_instance(instance, bundle, monkeypatch):
    """After the third the bundle is loaded again, in the middle of a call, and nobody else does it."""
    generate = Pipeline.__call__

    def fail(self, prompts, **options):
        if "broken" in prompts:
            raise EngineError("backbone: the engine is damaged")
        return generate(self, prompts, **options)

    monkeypatch.setattr(Pipeline, "__call__", fail)
    broken, good = instance.execute([asked(*["broken"] * 5), asked("x")])
    assert broken == ("backbone: the engine is damaged", 2)
    with Pipeline.load(bundle, threads=1) as pipe:
        assert good["image"].tobytes() == alone(pipe, "x", 0, height=64, width=64)


def test_a_request_that_cannot_be_read_disturbs_no_other(instance, monkeypatch):
    reloads = []
    monkeypatch.setattr(type(instance._model), "_retire", lambda *_, **__: reloads.append(1))
    wrong = [asked("x", loras=b'{"ink": 1}'), asked("x", loras=b"{"), asked("x", loras=3)]
    *errors, good = instance.execute([*wrong, asked("x")])
    assert [code for _, code in errors] == [1, 1, 2]
    assert good["image"].shape == (1, 64, 64, 3)
    assert not reloads


# A real server. The client libraries need numpy 1 as the server does, so the client is a program of their environment.


@pytest.fixture(scope="module")
def python() -> Path:
    return python_of("triton", "pytriton")


@pytest.fixture(scope="module")
def triton(python, bundle, tmp_path_factory):
    arguments = (bundle, "--name", "shapes", "--instances", 2, "--threads", 1, "--max-queue", QUEUE)
    with started(python, "serve_triton.py", *arguments, home=tmp_path_factory.mktemp("triton")) as running:
        yield running


def client(python: Path, triton, *cases: dict) -> list:
    """Send requests at once, each in its protocol; answers have shape, pixels, seeds and batch sizes, or an error."""
    grpc = triton.line.split(" on ")[1].split(",")[0]
    asked = json.dumps({"http": triton.url.removeprefix("http://"), "grpc": grpc, "cases": cases})
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script = Path(__file__).parent / "triton_client.py"
    done = subprocess.run([python, script], input=asked, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def case(protocol: str, *prompts: str, seeds=None, **inputs) -> dict:
    return {"protocol": protocol, "prompts": prompts, "seeds": seeds, "inputs": inputs}


@pytest.mark.slow
@pytest.mark.lengthy
def test_images_are_those_of_the_pipeline(python, triton, bundle):
    cases, expected = [], []
    with Pipeline.load(bundle, threads=1) as pipe:
        for number in range(QUEUE):
            width, height = ((64, 64), (48, 32))[number % 2]
            protocol, prompt = ("http", "grpc")[number // 2 % 2], f"{number} red circles"
            cases.append(case(protocol, prompt, seeds=[number], width=width, height=height))
            expected.append(alone(pipe, prompt, number, width=width, height=height).hex())
        answers = client(python, triton, *cases)
        assert [a["pixels"] for a in answers] == [[e] for e in expected]
        assert [a["seeds"] for a in answers] == [[n] for n in range(QUEUE)]
        # Some of them were generated together.
        assert max(b for a in answers for b in a["batch_sizes"]) > 1
        # Several images in one request, and the bundle's defaults.
        for protocol in ("http", "grpc"):
            (several,) = client(python, triton, case(protocol, "a red circle", "a heart", seeds=[7, 8]))
            assert several["pixels"] == [alone(pipe, "a red circle", 7).hex(), alone(pipe, "a heart", 8).hex()]
            assert several["shape"] == [2, 64, 64, 3] and several["batch_sizes"] == [2, 2]
            (random,) = client(python, triton, case(protocol, "a red circle"))
            assert random["pixels"] == [alone(pipe, "a red circle", random["seeds"][0]).hex()]


@pytest.mark.slow
@pytest.mark.lengthy
def test_loras_and_negative_prompts(python, tmp_path):
    """In one bundle: Qwen-Image itself, with slots."""
    base = Path(__file__).parent / "golden" / "qwen-tiny" / "base"
    options = ("--steps", "4", "--max-px", "64", "--max-sequence-length", "160", "--lora-slots", "attn")
    root = tmp_path / "bundle"
    assert cli.main(["export", "--base", str(base), "--out", str(root), *options]) == 0
    file = write_lora(tmp_path / "ink.safetensors", Bundle.open(root).manifest.slots(), 4, 1)
    size = {"width": 64, "height": 48}
    plain = {}, {}
    loras = {"loras": '{"ink": 0.8}'}, {"loras": {"ink": 0.8}}
    guided = (
        {"negative_prompt": "blurred", "true_cfg_scale": 3.0},
        {"negative_prompt": "blurred", "true_cfg_scale": 3.0},
    )
    asked = [plain, loras, guided, (loras[0] | guided[0], loras[1] | guided[1])]
    wrong = {
        "loras must be a JSON object of names and scales such as {\"ink\": 0.8}, got 'ink'": {"loras": "ink"},
        "loras must name LoRAs that this service has loaded, got 'inc'; it has 'ink'. A LoRA can also be merged into "
        "a bundle, with arcflow export --lora": {"loras": '{"inc": 1}'},
        "loras: the scale of 'ink' must be a number, got '1'": {"loras": '{"ink": "1"}'},
        "true_cfg_scale must be between 0 and 65, got 66.0": {"true_cfg_scale": 66.0},
    }
    arguments = (root, "--name", "shapes", "--instances", 1, "--lora", file)
    with started(python, "serve_triton.py", *arguments, home=tmp_path) as running:
        sent = [
            case("grpc" if i % 2 else "http", "a red circle", seeds=[5], **size, **told)
            for i, (told, _) in enumerate(asked)
        ]
        answers = client(python, running, *sent)
        failed = client(python, running, *(case("grpc", "x", **told) for told in wrong.values()))
    with Pipeline.load(root, threads=1) as pipe:
        pipe.load_lora(file)
        expected = [alone(pipe, "a red circle", 5, **size, **told).hex() for _, told in asked]
    assert [a["pixels"] for a in answers] == [[e] for e in expected]
    assert len(set(expected)) == len(asked)
    assert [a["error"] for a in failed] == [f"[StatusCode.INVALID_ARGUMENT] {m}" for m in wrong]


@pytest.mark.slow
@pytest.mark.lengthy
def test_a_wrong_request_gets_its_own_error(python, triton, bundle):
    wrong = {
        "width must be a multiple of 16, got 17; the nearest is 16": {"width": 17, "height": 16},
        "width and height must be given together, or neither": {"width": 16},
        "num_inference_steps must be between 1 and 1000, got 0": {"num_inference_steps": 0},
    }
    cases = [case(p, "x", **inputs) for p in ("http", "grpc") for inputs in wrong.values()]
    *failed, well = client(python, triton, *cases, case("grpc", "a red circle", seeds=[3]))
    expected = [f"[{code}] {m}" for code in ("400", "StatusCode.INVALID_ARGUMENT") for m in wrong]
    assert [a["error"] for a in failed] == expected
    with Pipeline.load(bundle, threads=1) as pipe:
        assert well["pixels"] == [alone(pipe, "a red circle", 3).hex()]


@pytest.mark.slow
@pytest.mark.lengthy
def test_triton_reads_the_configuration_as_it_was_meant(triton):
    config = httpx2.get(triton.url + "/v2/models/shapes/config").json()
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"]["default_queue_policy"] == {
        "timeout_action": "REJECT",
        "default_timeout_microseconds": 600_000_000,
        "allow_timeout_override": False,
        "max_queue_size": QUEUE,
    }
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert [(g["kind"], g["count"]) for g in config["instance_group"]] == [("KIND_CPU", 2)]
    assert {i["name"]: i["optional"] for i in config["input"]} == {
        "prompt": False,
        "seed": True,
        "width": True,
        "height": True,
        "num_inference_steps": True,
        "guidance_scale": True,
        "negative_prompt": True,
        "true_cfg_scale": True,
        "loras": True,
    }


@pytest.mark.slow
@pytest.mark.lengthy
def test_more_than_may_wait_is_refused(python, triton):
    # Each instance has one batch of eight, and the queue is full then.
    cases = [case("grpc", "x", seeds=[n], num_inference_steps=50) for n in range(4 * QUEUE)]
    answers = client(python, triton, *cases)
    refused = [a["error"] for a in answers if "error" in a]
    assert 0 < len(refused) < len(cases)
    assert set(refused) == {"[StatusCode.UNAVAILABLE] [request id: <id_unknown>] Exceeds maximum queue size"}


@pytest.mark.slow
@pytest.mark.lengthy
def test_sigterm_finishes_what_was_accepted(python, bundle, tmp_path):
    arguments = (bundle, "--name", "shapes", "--instances", 1, "--max-batch", 1)
    values = {"prompt": ("BYTES", "x"), "num_inference_steps": ("INT32", 200)}
    body = {"inputs": [{"name": k, "shape": [1, 1], "datatype": d, "data": [v]} for k, (d, v) in values.items()]}
    with started(python, "serve_triton.py", *arguments, home=tmp_path) as running, ThreadPoolExecutor(8) as pool:
        url = running.url + "/v2/models/shapes/infer"
        sent = [pool.submit(httpx2.post, url, json=body, timeout=300) for _ in range(8)]
        # They are generated one after the other, so most of them wait when the first one is answered.
        wait(sent, return_when=FIRST_COMPLETED)
        running.process.send_signal(signal.SIGTERM)
        assert [done.result().status_code for done in sent] == [200] * 8
        assert running.process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.lengthy
def test_requests_of_an_instance_that_died_get_an_error(python, bundle, tmp_path):
    with started(python, "serve_triton.py", bundle, "--name", "shapes", "--instances", 1, home=tmp_path) as running:
        (pid,) = processes_of(running, b"triton_python_backend_stub")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(running, b"triton_python_backend_stub"))
        for _ in range(2):
            (answer,) = client(python, running, case("grpc", "a red circle"))
            assert answer["error"].endswith("Stub process 'shapes_0_0' is not healthy.")
        # Triton still calls itself ready, as docs/scale.md says.
        assert httpx2.get(running.url + "/v2/health/ready").status_code == 200
