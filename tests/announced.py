"""Match the line that a stage prints on stderr before it starts; used by the tests of the long commands."""

from __future__ import annotations

import re

#: "STAGE: about TIME, MEMORY", and the disk space if it is large.
LINE = r"\w+: about [\w ]+, \d+\.\d GiB of memory(, \d+\.\d GB of disk)?\n"


def after_announcement(err: str) -> str:
    """`err`, a command's stderr, without the announcement, which is its first line if there is one."""
    return re.sub(LINE, "", err, count=1)
