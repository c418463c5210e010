"""Serve a bundle with Ray Serve on this machine alone, until SIGTERM. Prints its address.

    python benchmarks/serve_ray.py BUNDLE [ARGUMENT=VALUE ...]

Arguments are those of `arcflow_serve.ray:application`. Ray listens on 127.0.0.1 only, and its files are in a folder of
their own.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import threading

# Ray reads this when it is imported, so it is set before.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import serve

from arcflow_serve.ray import application

START_TRIES = 3


def main() -> int:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT=VALUE")
    parser.add_argument("--cpus", type=int, help="cores that Ray may give away (default: all)")
    args = parser.parse_args()
    ended = threading.Event()
    # Ray's sockets are in the folder, and their paths may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        try:
            start(args.cpus, folder)
            port = _free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
            serve.run(application({"bundle": args.bundle} | dict(x.split("=", 1) for x in args.arguments)))
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, lambda *_: ended.set())
            print(f"serving Ray on http://127.0.0.1:{port}", flush=True)
            ended.wait()
            serve.shutdown()
        finally:
            ray.shutdown()
    return 0


def start(cpus: int | None, folder: str) -> None:
    """Start Ray, which gives itself 30 s for it; on a busy machine it may need more than one try.

    Raises:
        RuntimeError: it does not start.
    """
    for _ in range(START_TRIES):
        try:
            ray.init(
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
                object_store_memory=128 << 20,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            return
        except Exception as e:
            # Ray has no class of its own for this.
            print(f"Ray did not start: {e}", file=sys.stderr)
            ray.shutdown()
    raise RuntimeError(f"Ray must start in one of {START_TRIES} tries; the messages above say why it did not")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port: int = bound.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
