"""Say what a stage will take before it starts, and refuse one that cannot fit; for every command that takes long."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.costs.machine import Machine

#: Below this nobody waits for a measurement of the machine.
_SHORT_S = 60.0


def add_anyway(parser: argparse.ArgumentParser) -> None:
    """Declare --anyway."""
    parser.add_argument(
        "--anyway", action="store_true", help="start even if the memory or disk that it needs is not free"
    )


def announce(cost_of: Callable[[Machine], Cost], folder: Path, anyway: bool) -> None:
    """Print a stage's cost on stderr.

    Args:
        cost_of: the cost on a machine.
        folder: on the disk that is written to.
        anyway: do not refuse.

    Raises:
        ExportError: it cannot fit.
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
