"""The result of a check, as a line for the terminal: its name, whether it passed, what was found and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: "note": something that is missing or unknown and is not needed for what was asked.
State = Literal["ok", "note", "fail"]
_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One line of the report. A failed check always says in `do` what to do."""

    name: str
    state: State
    found: str
    do: str = ""

    def __post_init__(self) -> None:
        assert self.state != "fail" or self.do, f"{self.name} fails and does not say what to do"


def failure(name: str, message: str) -> Finding:
    """A failed check from an error message of the form "what is wrong; what to do", or with a colon between them."""
    separator = "; " if "; " in message else ": "
    found, _, do = message.partition(separator)
    return Finding(name, "fail", found, do or "see `arcflow compile --help`")


def report(findings: Sequence[Finding]) -> str:
    """The findings as text, one below the other."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines += _wrapped(f"{f.state.upper() if f.state == 'fail' else f.state:4}  {f.name:{width}}  ", f.found)
        if f.do:
            lines += _wrapped(" " * (width + 8) + "-> ", f.do)
    return "\n".join(lines)


def _wrapped(first: str, text: str) -> list[str]:
    # Long words are commands and paths, which are copied.
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
