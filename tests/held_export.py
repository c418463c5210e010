"""`arcflow ...` that waits once it has written its first weights: for tests that stop an export at a known point."""

from __future__ import annotations

import sys
import time

from arcflow_export.export import export
from arcflow_runtime import cli

_write_weights = export.write_weights


def write_and_wait(*arguments):
    """Write, say so on stdout, and wait for the signal; without one go on after ten minutes."""
    written = _write_weights(*arguments)
    print("written", flush=True)
    time.sleep(600)
    return written


if __name__ == "__main__":
    export.write_weights = write_and_wait
    sys.exit(cli.main(sys.argv[1:]))
