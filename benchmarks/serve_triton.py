"""Serve a bundle with the Triton server of nvidia-pytriton on this machine alone, until SIGTERM. Prints its addresses.

    python benchmarks/serve_triton.py BUNDLE [OPTION ...]

Options are those of `arcflow triton`. This Python must have the extra `triton`, and Triton runs the model with it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import pytriton

from arcflow_runtime import cli

START_S, STOP_S = 300, 60


def main() -> int:
    """Serve until a signal."""
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix="arcflow-triton-") as folder:
        repository, server = Path(folder) / "repository", install(Path(folder) / "server")
        # The addresses must be the first line of the standard output.
        with contextlib.redirect_stdout(sys.stderr):
            if code := cli.main(["triton", *sys.argv[1:], "--out", str(repository)]):
                return code
        http_port, grpc_port = free_ports(2)
        process = subprocess.Popen(
            [
                server / "bin" / "tritonserver",
                f"--model-repository={repository}",
                f"--backend-directory={server / 'backends'}",
                *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc")),
                f"--http-port={http_port}",
                f"--grpc-port={grpc_port}",
                "--allow-metrics=false",
                # The configuration must be complete and right by itself.
                "--disable-auto-complete-config",
                "--log-info=false",
            ],
            env=environment(),
        )
        try:
            wait_until_ready(process, http_port)
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, lambda *_: ended.set())
            print(
                f"serving Triton with gRPC on 127.0.0.1:{grpc_port}, HTTP on http://127.0.0.1:{http_port}", flush=True
            )
            while not ended.wait(0.1) and process.poll() is None:
                pass
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return process.returncode


def install(folder: Path) -> Path:
    """Copy the server to `folder`, and the stub for this version of Python to where the server looks for it."""
    source = Path(pytriton.__file__).parent / "tritonserver"
    stubs = source / "python_backend_stubs"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(stubs.name))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(stubs / version / "triton_python_backend_stub", folder / "backends" / "python")
    return folder


def environment() -> dict[str, str]:
    """Variables for the server: its stub needs libpython, and uses the environment of the first `python` in PATH."""
    libraries = [
        Path(pytriton.__file__).parent.parent / "nvidia_pytriton.libs",
        Path(sysconfig.get_config_var("LIBDIR")),
    ]
    paths = {"LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}
    paths["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | paths


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    bound = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [s.getsockname()[1] for s in bound]
    for one in bound:
        one.close()
    return found


def wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the model is loaded.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(
        f"Triton must be ready within {START_S} s, got exit status {process.poll()} (None: it runs); see its output"
    )


if __name__ == "__main__":
    sys.exit(main())
