"""Run `arcflow compile` with the fake stages of `fake_stage.py`, and kill it at a chosen point.

$FAKE_KILL is "put STAGE", before the stage's record is written, or "replace STAGE", before the record's file is
renamed.
"""

import os
import signal
import sys
from pathlib import Path

from arcflow_export.export import staging
from arcflow_export.pipeline import process
from arcflow_export.pipeline.records import StageRecords
from arcflow_runtime import cli

# Without `site`, which takes longer to start than the stage to run.
process.COMMAND = (sys.executable, "-S", str(Path(__file__).with_name("fake_stage.py")))
point, _, stage = os.environ.get("FAKE_KILL", "").partition(" ")
put, replace = StageRecords.put, os.replace


def killed_before_it_puts(self, name, record):
    if record.stage == stage and record.state == "done":
        if point == "put":
            os.kill(os.getpid(), signal.SIGKILL)
        staging.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, record)


if point:
    StageRecords.put = killed_before_it_puts
sys.exit(cli.main(["compile", *sys.argv[1:]]))
