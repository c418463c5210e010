"""`arcflow STAGE ...` that keeps what it traces in $TRACES, as the tests' own exports do."""

import os
import sys
from pathlib import Path

from arcflow_runtime import cli

if sys.argv[1] == "export":
    from arcflow_export.graph import trace
    from tests.traces import Traces

    trace._convert = Traces(Path(os.environ["TRACES"])).convert
sys.exit(cli.main())
