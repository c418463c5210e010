"""Write a model repository for NVIDIA's Triton Inference Server.

Start Triton with --model-repository and the directory. Its Python needs this package, and the bundle must be where the
configuration says. Several bundles can be added to one repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arcflow_runtime.backends import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    from arcflow_serve.triton_repository import TritonOptions

    default = TritonOptions()
    parser.add_argument("bundle", type=Path, help="directory of a bundle")
    parser.add_argument("--out", type=Path, required=True, metavar="REPOSITORY", help="directory to add the model to")
    parser.add_argument("--name", help="name of the model (default: the bundle's directory)")
    parser.add_argument(
        "--bundle-path", metavar="PATH", help="where the server finds the bundle (default: where it is now)"
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="LoRA that requests may use, named after its file; repeatable; for bundles with LoRA slots",
    )
    parser.add_argument(
        "--lora-folder", metavar="PATH", help="where the server finds the LoRAs (default: where they are now)"
    )
    parser.add_argument(
        "--backend", choices=sorted(BACKENDS), default=default.backend, help="engine (default: %(default)s)"
    )
    parser.add_argument(
        "--instances",
        type=int,
        metavar="N",
        help="processes that generate, on the CPU or on each GPU (default: 1 for each GPU; on a CPU 2)",
    )
    parser.add_argument(
        "--threads", type=int, help="CPU threads of an instance (default: the cores shared by the instances)"
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        default=default.max_batch,
        metavar="N",
        help="most images of a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=default.max_queue,
        metavar="N",
        help="most requests that may wait (default: %(default)s)",
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=default.deadline_s,
        metavar="SECONDS",
        help="time a request may wait to be started (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the repository."""
    from arcflow_serve.triton_repository import TritonOptions, write_repository

    options = TritonOptions(
        args.backend,
        args.instances,
        args.threads,
        args.max_batch,
        args.max_queue,
        args.deadline,
        args.bundle_path,
        tuple(args.lora),
        args.lora_folder,
    )
    folder = write_repository(args.bundle, args.out, args.name, options)
    print(f"{folder}; start it with: tritonserver --model-repository {args.out}")
    return 0
