"""The Dockerfile, built and run with buildah where it is installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from arcflow_runtime import Pipeline
from tests.conftest import SHAPES_OPTIONS
from tests.hub import Hub
from tests.serving import GENERATE, alone, image_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.lengthy]
ROOT = Path(__file__).parent.parent
#: The entry point listens there.
PORT = 8000
START_S = 120.0


@pytest.fixture(scope="module")
def buildah(tmp_path_factory):
    """A function that runs buildah with storage of its own, and returns what it prints; .line is its command line."""
    if shutil.which("buildah") is None:
        pytest.skip("needs buildah (Debian: buildah; and debootstrap, if no registry of images can be reached)")
    if os.geteuid():
        pytest.skip("needs root: chroot isolates what the Dockerfile runs")
    folder = tmp_path_factory.mktemp("buildah")
    storage = ["--root", folder / "root", "--runroot", folder / "runroot", "--storage-driver", "vfs"]

    def line(*arguments) -> list[str]:
        return list(map(str, ["buildah", *storage, *arguments]))

    def run(*arguments) -> str:
        done = subprocess.run(line(*arguments), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    run.line = line
    yield run
    run("rm", "--all")
    run("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def base(buildah, tmp_path_factory) -> str:
    """A base for the Dockerfile: of Debian's packages with debootstrap, or else the Dockerfile's own, pulled."""
    if shutil.which("debootstrap") is None:
        (name,) = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "serving" / "Dockerfile").read_text(), re.MULTILINE)
        return f"docker.io/library/{name}"
    targets = ("apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)", "Created-By: Packages")
    listed = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split("\n")
    # The line of the release itself, not of its updates. `site` is the mirror that this machine uses.
    release, site = next(line for line in listed if re.match(r"[a-z]+ ", line)).split()
    root = tmp_path_factory.mktemp("debian") / "root"
    packages = "python3,python3-dev,python3-venv,ca-certificates"
    line = ["debootstrap", "--variant=minbase", f"--include={packages}", release, root, site]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, root, "/")
    buildah("commit", "--quiet", container, "localhost/base")
    return "localhost/base"


def of_pip() -> list[str]:
    """Options that give a build this machine's settings of pip: its variables, and the files that settings name."""
    found = subprocess.run([sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True, check=True)
    files = re.findall(r"^ +(/\S+), exists: True$", found.stdout, re.MULTILINE)
    variables = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    text = "\n".join([*(Path(file).read_text() for file in files), *variables.values()])
    named = re.findall(r"(?:^|[\s=])(/[^/\s][^\s]*)", text, re.MULTILINE)
    # The files of an index on this machine are beside its pages.
    named += [str(Path(index).parent) for index in re.findall(r"file://(/\S+)", text)]
    paths = sorted({path for path in map(Path, [*files, *named]) if path.exists() and path != Path("/")})
    options = [f"--volume={path}:{path}:ro" for path in paths]
    return options + [f"--env={key}={value}" for key, value in variables.items()]


def test_the_image_serves(buildah, base, bundles, tmp_path):
    """A mounted bundle, and one from the hub."""
    bundle = bundles("shapes", **SHAPES_OPTIONS)
    hub = tmp_path / "hub"
    shutil.copytree(bundle, hub / "owner" / "name")
    options = ("--format", "docker", "--isolation", "chroot", "--quiet", "--layers=false")
    arguments = ("--build-arg", f"BASE={base}", "--file", "serving/Dockerfile", "--tag", "localhost/arcflow")
    buildah("build", *options, *of_pip(), *arguments, ROOT)
    container = buildah("from", "localhost/arcflow")
    run = ("run", "--isolation", "chroot", "--volume", f"{bundle}:/bundles/shapes:ro", container, "--")
    entry = ("arcflow", "serve", "--host", "127.0.0.1", "--port", str(PORT))
    assert buildah("inspect", "--format", "{{.OCIv1.Config.User}}", container) == "65532:65532"
    found = buildah("inspect", "--format", "{{.OCIv1.Config.Entrypoint}}", container)
    assert found == "[arcflow serve --host 0.0.0.0 --port 8000]"
    assert buildah(*run, "sh", "-c", "id -u; ls /opt/arcflow/bin/pip* /source 2>/dev/null || true") == "65532"
    # The host's network is the container's here, so the service listens on the loopback address, not on all of them.
    line = buildah.line(*run, *entry, "/bundles/shapes")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{PORT}"
        assert process.stdout.readline() == f"serving shapes on {url}\n"
        wait_until(lambda: healthy(url), START_S)
        reply = httpx2.post(url + GENERATE, json={"prompt": "a red circle", "seed": 3}, timeout=60).json()
        with Pipeline.load(bundle, threads=1) as pipe:
            assert image_of(reply["data"][0]["b64_json"]).tobytes() == alone(pipe, "a red circle", 3)
        kind, *check = json.loads(buildah("inspect", container))["Docker"]["config"]["Healthcheck"]["Test"]
        assert kind == "CMD"
        buildah(*run, *check)
        with Hub(hub) as running:
            # The image's own cache is used.
            home = {"HF_HOME", "HF_HUB_CACHE"}
            told = [f"--env={k}={v}" for k, v in running.environment(tmp_path).items() if k not in home]
            checked = buildah(run[0], *told, *run[1:], "arcflow", "serve", "owner/name", "--check")
        assert checked.startswith("name: 16x16 in ") and checked.endswith("the image of the pipeline alone")
        assert any(name.endswith("manifest.json") for name in running.downloads)
    finally:
        process.send_signal(signal.SIGTERM)
        # The exit code is buildah's own.
        process.wait(60)
        process.stdout.close()


def healthy(url: str) -> bool:
    try:
        return httpx2.get(url + "/health").status_code == 200
    except httpx2.TransportError:
        time.sleep(0.1)
        return False
