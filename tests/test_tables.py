"""The tables in the pages are those of the committed results."""

from __future__ import annotations

import pytest
import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_tables_are_those_of_the_results(page):
    assert page.read_text() == tables.with_tables(page), "run python benchmarks/tables.py"


def test_a_figure_that_was_edited_is_noticed(tmp_path, monkeypatch):
    (page,) = (p for p in tables.PAGES if p.name == "README.md" and "run" in tables.PAGES[p])
    copy = tmp_path / "README.md"
    copy.write_text(page.read_text().replace("| 33.7 GB |", "| 30.7 GB |"))
    monkeypatch.setitem(tables.PAGES, copy, tables.PAGES[page])
    assert copy.read_text() != page.read_text()
    assert tables.with_tables(copy) == page.read_text()
