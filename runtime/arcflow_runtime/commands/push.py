"""Push a bundle to the Hugging Face hub, with a model card that is written from its manifest.

Every file is compared with its SHA-256 first. All files are one commit, so the repository never has half a bundle. Log
in with `hf auth login` and a token that may write. Built engines are not pushed: `arcflow build` builds them where they
run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch; created if it does not exist (default: main)")
    parser.add_argument(
        "--license", metavar="ID", help="licence of the base, such as apache-2.0; needed if the base is not a known one"
    )
    parser.add_argument("--json", action="store_true", help="print the repository and the commit as JSON")


def run(args: argparse.Namespace) -> int:
    """Push the bundle and print the commit."""
    from arcflow_runtime.hub.push import push_bundle

    pushed = push_bundle(args.bundle, args.repository, args.private, args.revision, args.license)
    if args.json:
        print(json.dumps(dataclasses.asdict(pushed), indent=2))
        return 0
    print(f"{pushed.repo_id} at {pushed.commit}: {pushed.files} files, {pushed.bytes / 1e9:.2f} GB, and a model card")
    print(f'use it: arcflow generate {pushed.repo_id}@{pushed.commit} "PROMPT"')
    return 0
