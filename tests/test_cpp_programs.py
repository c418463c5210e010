"""Programs that use the C++ library: its examples, and tests that are written in C++."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cpp import CPP, embed, library_of, run
from tests.fake_bundle import make_bundle


@pytest.mark.slow
def test_the_header_is_c11_and_the_wrapper_needs_no_rtti(tmp_path, cpp_build):
    includes = ["-I", CPP / "include", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    (tmp_path / "c.c").write_text(
        "#include <arcflow/arcflow.h>\nint main(void) { return arcflow_abi_version() != 1; }\n"
    )
    (tmp_path / "cpp.cpp").write_text("#include <arcflow/arcflow.hpp>\nint main() { return 0; }\n")
    run([os.environ.get("CC", "cc"), "-std=c11", "-fsyntax-only", *includes, tmp_path / "c.c"])
    for flags in ([], ["-fno-rtti"]):
        run([os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", *flags, *includes, tmp_path / "cpp.cpp"])
    assert len((CPP / "include" / "arcflow" / "arcflow.h").read_text().splitlines()) < 200


def test_only_the_abi_is_exported(cpp_build):
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    lines = run(["nm", "-D", "--defined-only", library_of(cpp_build)]).stdout.splitlines()
    assert {line.split()[-1].partition("@")[0] for line in lines} == set(embed.FUNCTIONS)


def test_the_c_example(cpp_build, cpp_bundles, cpp_pipes, tmp_path):
    prompt, out = "a large red circle on the left, blue background", tmp_path / "out.ppm"
    run([cpp_build / "example_generate", cpp_bundles("shapes"), prompt, out, "42"])
    image = np.asarray(Image.open(out))
    np.testing.assert_array_equal(image, cpp_pipes("shapes").generate([prompt], seeds=[42]).pixels[0])
    done = subprocess.run([cpp_build / "example_generate", "nowhere", "x", out], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        f"{Path.cwd() / 'nowhere'} is not a directory; give the directory that `arcflow export --out` wrote\n",
    )


def test_the_python_example(cpp_build, cpp_bundles, tmp_path):
    out = tmp_path / "out.ppm"
    command = [sys.executable, CPP / "examples" / "embed.py", cpp_bundles("shapes"), "a yellow heart", out]
    run(command, env=os.environ | {"ARCFLOW_LIBRARY": str(library_of(cpp_build))})
    assert Image.open(out).size == (64, 64)


def test_the_pipeline_with_engines_that_record(cpp_build, tmp_path):
    """Run pipeline_test.cpp on bundles whose graphs are not real."""
    roots = [
        make_bundle(tmp_path / "flux"),
        make_bundle(tmp_path / "qwen", "qwen-image", baked=(2, 4)),
        make_bundle(tmp_path / "half", precision="float16"),
    ]
    run([cpp_build / "tests" / "pipeline_test", *roots])


@pytest.mark.slow
def test_the_cpp_wrapper(cpp_build, cpp_bundles):
    run([cpp_build / "tests" / "wrapper_test", cpp_bundles("shapes")])


@contextlib.contextmanager
def serving(build: Path, bundle: Path):
    """The example service on a bundle: its process and its address."""
    if not (build / "example_serve").exists():
        pytest.skip("the service was not built: cpp-httplib was not found")
    command = [build / "example_serve", bundle, "--port", "0", "--workers", "2", "--queue", "1"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def server(cpp_build, cpp_bundles):
    with serving(cpp_build, cpp_bundles("shapes")) as running:
        yield running


def post(url: str, body: bytes) -> tuple[int, bytes, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", body), timeout=60) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read(), dict(e.headers)


def test_the_http_service(server, cpp_pipes):
    _, url = server
    with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
        assert answer.read() == b"ok\n"
    prompt = "a small yellow heart on a black background"
    status, body, headers = post(url, json.dumps({"prompt": prompt, "seed": 2**64 - 1, "height": 48}).encode())
    assert (status, headers["Content-Type"], headers["X-Seed"]) == (200, "image/png", str(2**64 - 1))
    expected = cpp_pipes("shapes").generate([prompt], seeds=[2**64 - 1], height=48).pixels[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), expected)
    # A negative seed means its two's complement, as in Python.
    negative = post(url, json.dumps({"prompt": prompt, "seed": -1, "height": 48}).encode())
    assert (negative[0], negative[1], negative[2]["X-Seed"]) == (200, body, str(2**64 - 1))
    wrong = {
        b"{": 'the body must be a JSON object such as {"prompt": "a red circle"}',
        b"{}": "prompt is missing",
        b'{"prompt": 3}': "prompt must be a string",
        b'{"prompt": "x", "sampler": 1}': "unknown key 'sampler'; it must be prompt, seed, height, width, "
        "num_inference_steps, negative_prompt or true_cfg_scale",
        b'{"prompt": "x", "negative_prompt": ["y"]}': "negative_prompt must be a string",
        b'{"prompt": "x", "true_cfg_scale": "4"}': "true_cfg_scale must be a number",
        b'{"prompt": "x", "negative_prompt": "y"}': "request.negative_prompts is not supported: the student is "
        "distilled to run once per step, without a negative prompt; leave it at its default",
        b'{"prompt": "x", "seed": 1.5}': "seed must be an integer from -2**63 to 2**64 - 1",
        b'{"prompt": "x", "height": 2.5}': f"height must be an integer from 0 to {2**31 - 1}",
        b'{"prompt": "x", "width": 40}': "request.width must be a multiple of 16, got 40; the nearest is 32",
    }
    for body, message in wrong.items():
        assert post(url, body)[:2] == (400, json.dumps({"error": message}, separators=(",", ":")).encode()), body
    assert post(url, json.dumps({"prompt": "x" * 100_000}).encode())[0] == 413


def test_the_http_service_turns_away_what_it_cannot_queue_and_stops_gracefully(server):
    process, url = server
    long = json.dumps({"prompt": "x", "seed": 1, "num_inference_steps": 200}).encode()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, url, long) for _ in range(8)]
        # Two run and one waits; the five others are answered at once. All have arrived before the service is stopped.
        refused = []
        while len(refused) < 5:
            refused = [a for a in answers if a.done()]
        assert all(a.result()[0] == 503 for a in refused)
        assert refused[0].result()[2]["Retry-After"] == "1"
        process.send_signal(signal.SIGTERM)
        assert sorted(a.result()[0] for a in answers) == [200] * 3 + [503] * 5
    assert process.wait(60) == 0
