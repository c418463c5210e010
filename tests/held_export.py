"""`arcflow ...` that waits once it has written its first weights: for tests that stop an export at a known point.

It has the tests' cache of traced parts in $TRACES; see `traces.py`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from arcflow_export.export import export
from arcflow_export.graph import trace
from arcflow_runtime import cli
from tests.traces import Traces

_write_weights = export.write_weights


def write_and_wait(*arguments):
    """Write, say so on stdout, and wait for the signal; without one go on after ten minutes."""
    written = _write_weights(*arguments)
    print("written", flush=True)
    time.sleep(600)
    return written


if __name__ == "__main__":
    trace._convert = Traces(Path(os.environ["TRACES"])).convert
    export.write_weights = write_and_wait
    sys.exit(cli.main(sys.argv[1:]))
