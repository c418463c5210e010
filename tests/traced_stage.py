"""Run `arcflow STAGE ...` with the tests' cache of traced parts in $TRACES; see `traces.py`."""

import os
import sys
from pathlib import Path

from arcflow_runtime import cli

if sys.argv[1] == "export":
    from arcflow_export.graph import trace
    from tests.traces import Traces

    trace._convert = Traces(Path(os.environ["TRACES"])).convert
sys.exit(cli.main())
