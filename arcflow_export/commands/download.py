"""Download a student's base, adapter and LoRAs from the hub into its cache: exactly the files that later stages read.

Files that are already in the cache are not downloaded again, and an interrupted download continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from arcflow_export.commands.sources import add_source_arguments, add_vae_arguments, vae_location

if TYPE_CHECKING:
    from arcflow_export.checkpoint.sources import Choose, Location


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_source_arguments(parser)
    add_vae_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the paths and commits as JSON")


def run(args: argparse.Namespace) -> int:
    """Download the files and print their paths."""
    from huggingface_hub.utils import logging

    from arcflow_export.checkpoint.sources import measure, resolve

    logging.set_verbosity_error()
    wanted = _wanted(args)
    # Check all of them before the first download, which may take an hour.
    sizes = [measure(location, what, choose) for what, location, choose in wanted]
    rows = []
    for (what, location, choose), size in zip(wanted, sizes, strict=True):
        if size.files:
            here = f", {size.cached_bytes / 1e9:.2f} GB of it already in the cache" if size.cached_bytes else ""
            print(f"{what}: {size.name}, {size.bytes / 1e9:.2f} GB{here}", file=sys.stderr)
        found = resolve(location, what, choose)
        rows.append(
            {
                "what": what,
                "name": found.name,
                "revision": found.revision,
                "path": str(found.path),
                "bytes": size.bytes,
                "fetched_bytes": size.bytes - size.cached_bytes,
            }
        )
    if args.json:
        print(json.dumps({"checkpoints": rows}, indent=2))
    else:
        for row in rows:
            commit = f" at {row['revision']}" if row["revision"] else ""
            print(f"{row['what']}: {row['name']}{commit}: {row['path']}")
    return 0


def _wanted(args: argparse.Namespace) -> list[tuple[str, Location, Choose]]:
    from arcflow_export.checkpoint.layout import adapter_files, base_files, lora_files, vae_files
    from arcflow_export.checkpoint.sources import Location
    from arcflow_runtime.errors import RequestError

    wanted: list[tuple[str, Any, Any]] = [
        ("base checkpoint", Location(args.base, args.base_subfolder, args.base_revision, args.offline), base_files),
    ]
    if args.adapter is not None:
        adapter = Location(args.adapter, args.adapter_subfolder, args.adapter_revision, args.offline)
        wanted.append(("adapter", adapter, adapter_files))
    if args.lora:
        from arcflow_runtime.lora.argument import parse_lora

        try:
            names = [parse_lora(text)[0] for text in args.lora]
        except ValueError as e:
            raise RequestError(str(e)) from None
        wanted += [("LoRA", Location(name, offline=args.offline), lora_files) for name in names]
    if (vae := vae_location(args)) is not None:
        wanted.append(("VAE", vae, vae_files))
    return wanted
