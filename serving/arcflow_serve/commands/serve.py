"""Serve bundles over HTTP: OpenAI's images API, and a page to look at.

Open the printed address in a browser, or give it to OpenAI's client as base_url with /v1 at its end. SIGTERM and Ctrl-C
finish the requests that were accepted; a second one stops at once.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_runtime.backends import choices
from arcflow_runtime.engines.modes import MODES

if TYPE_CHECKING:
    from arcflow_serve.settings import Settings

_log = logging.getLogger("arcflow.serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from arcflow_serve.settings import Settings

    default = Settings()
    parser.add_argument(
        "bundle",
        nargs="+",
        type=Path,
        help="directory of a bundle, or OWNER/NAME[@REVISION] on the hub; the first is the default model",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help="file of API keys, one a line; keys are also read from ARCFLOW_API_KEYS, separated by commas",
    )
    parser.add_argument("--backend", choices=choices(), default=default.backend, help="engine (default: %(default)s)")
    parser.add_argument("--memory", choices=MODES, help="parts that stay loaded (default: by the free memory)")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="LoRA that requests may use, named after its file; repeatable; for bundles with LoRA slots",
    )
    parser.add_argument(
        "--warm-up",
        action="append",
        default=[],
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="generate this size in all batch sizes before the service is ready; repeatable; for a GPU",
    )
    parser.add_argument(
        "--lanes", type=int, default=default.lanes, help="batches generated at a time (default: 2, or 1 on one core)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of each lane (default: the cores shared by the lanes)")
    for name, text in {
        "max-batch": "most images of a batch",
        "max-queue": "most images that may wait; beyond it the status is 429",
        "max-n": "most images of one request",
        "max-steps": "most denoising steps",
        "max-prompt-chars": "longest prompt in characters",
        "max-body-bytes": "largest request in bytes",
        "max-connections": "most open connections",
    }.items():
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--max-px", type=int, metavar="N", help="largest height or width (default: the bundle's)")
    for name, text in {
        "deadline": "time a request may wait to be started",
        "hang-timeout": "time after which a batch is given up",
        "drain-timeout": "time that requests get to finish after SIGTERM",
        "body-timeout": "time a client has to send headers, and the body",
        "write-timeout": "time in which a client must read something of its reply",
    }.items():
        value = getattr(default, name.replace("-", "_") + "_s")
        parser.add_argument(
            f"--{name}", type=float, default=value, metavar="SECONDS", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--check", action="store_true", help="start on a free port, generate an image with each bundle, and exit"
    )


def _size(text: str) -> tuple[int, int]:
    from arcflow_serve.settings import parse_size

    try:
        return parse_size(text)
    except ValueError as e:
        # argparse shows the message of this exception, and not that of a ValueError.
        raise argparse.ArgumentTypeError(str(e)) from None


def run(args: argparse.Namespace) -> int:
    """Serve until a signal, or check the service."""
    settings = _settings(args)
    if args.check:
        from arcflow_serve.check import check_service

        for line in check_service(args.bundle, settings):
            print(line)
        return 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    _serve(args, settings)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from arcflow_serve.keys import read_keys
    from arcflow_serve.settings import Settings

    return Settings(
        backend=args.backend,
        memory=args.memory,
        loras=tuple(args.lora),
        warm_up=tuple(args.warm_up),
        lanes=args.lanes,
        threads=args.threads,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        max_n=args.max_n,
        max_steps=args.max_steps,
        max_px=args.max_px,
        max_prompt_chars=args.max_prompt_chars,
        max_body_bytes=args.max_body_bytes,
        max_connections=args.max_connections,
        body_timeout_s=args.body_timeout,
        write_timeout_s=args.write_timeout,
        deadline_s=args.deadline,
        hang_timeout_s=args.hang_timeout,
        drain_timeout_s=args.drain_timeout,
        api_keys=read_keys(args.api_keys),
    )


def _serve(args: argparse.Namespace, settings: Settings) -> None:
    from arcflow_serve.app import create_app
    from arcflow_serve.models import open_models
    from arcflow_serve.server import Server, bind, url_of
    from arcflow_serve.service import Service

    # The address first: a port that is taken is found before large bundles are loaded.
    bound = bind(args.host, args.port)
    if not settings.api_keys and not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        _log.warning("%s can be reached from other machines and has no API keys; see --api-keys", url_of(bound))
    service = Service(open_models(args.bundle, settings), settings)
    service.start()
    server = Server(create_app(service, settings), service, settings)
    # Who reads the next line may connect at once, and is served when the server has started.
    bound.listen(server.config.backlog)
    print(f"serving {', '.join(service.models)} on {url_of(bound)}", flush=True)
    server.run([bound])
