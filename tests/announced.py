"""What a stage prints on stderr before it starts."""

from __future__ import annotations

import re

#: A stage, about how long, memory, and the disk where it is worth a word.
LINE = r"\w+: about [\w ]+, \d+\.\d GiB of memory(, \d+\.\d GB of disk)?\n"


def after_announcement(err: str) -> str:
    """What stderr holds beside the announcement, which comes first where there is one."""
    return re.sub(LINE, "", err, count=1)
