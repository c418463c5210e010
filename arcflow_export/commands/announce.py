"""Print a stage's estimated time, memory and disk before it starts, and refuse a stage that cannot fit.

Every command that takes long calls `announce`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.costs.machine import Machine

#: Work shorter than this is estimated with typical speeds, because measuring the machine would take too long.
_SHORT_S = 60.0


def add_anyway(parser: argparse.ArgumentParser) -> None:
    """Declare --anyway."""
    parser.add_argument("--anyway", action="store_true", help="start even if there is not enough free memory or disk")


def announce(cost_of: Callable[[Machine], Cost], folder: Path, anyway: bool) -> None:
    """Print a stage's cost on stderr.

    Args:
        cost_of: computes the cost for a machine.
        folder: a folder on the disk that will be written to.
        anyway: do not refuse a stage that cannot fit.

    Raises:
        ExportError: the stage cannot fit.
    """
    from arcflow_export.costs.costs import check_fits
    from arcflow_export.costs.machine import measure, typical

    machine = typical(folder)
    cost = cost_of(machine)
    if cost.seconds is None or cost.seconds > _SHORT_S:
        machine = measure(folder)
        cost = cost_of(machine)
    print(cost.sentence(), file=sys.stderr)
    if not anyway:
        check_fits(cost, machine)
