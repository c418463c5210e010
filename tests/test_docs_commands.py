"""Commands that the pages show have options that exist. tests/test_readme.py also runs those of the README."""

from __future__ import annotations

import re
import shlex

import pytest

from arcflow_runtime import cli
from tests.test_docs_links import ROOT, pages


def commands(text: str) -> list[str]:
    """The indented lines that call `arcflow`, without synopses, whose brackets mark what is optional."""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    return [line.strip() for line in lines if re.match(r"    arcflow ", line) and "[" not in line]


PAGES = [page for page in pages() if commands((ROOT / page).read_text(encoding="utf-8"))]


def test_pages_with_commands_are_found():
    assert {"README.md", "docs/calibration.md", "docs/drift.md", "docs/engines.md"} <= {
        page.as_posix() for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_can_be_parsed(page):
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        # The others of "arcflow verify BUNDLE ..." are for the reader to fill in.
        arguments = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
        try:
            cli.check_usage(arguments)
        except SystemExit:
            pytest.fail(f"{page}: {command}")
