"""Links between the committed pages lead somewhere: files, and headings in them. Nothing is fetched."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
#: Folders that hold no pages of this project: hidden ones, and what is built or generated.
SKIPPED = {"out", "build", "dist", "node_modules"}
#: Pages whose code spans name source files, and the folders that these names start from.
NAMING, BASES = (
    ("docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md"),
    ("", "runtime/arcflow_runtime", "arcflow_export", "serving/arcflow_serve"),
)


def pages() -> list[Path]:
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
    return sorted(p for p in found if not any(part in SKIPPED or part.startswith(".") for part in p.parts[:-1]))


def tokens(text: str) -> list[Token]:
    """All tokens, those inside of paragraphs and headings too."""
    top = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for outer in top for token in (outer, *(outer.children or []))]


def anchors(text: str) -> set[str]:
    """The headings' anchors as GitHub makes them: lower case, without punctuation, numbered where they repeat."""
    top, seen, made = MarkdownIt("commonmark").parse(text), {}, set()
    for heading, inline in pairwise(top):
        if heading.type == "heading_open":
            words = "".join(child.content for child in inline.children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            count = seen[slug] = seen.get(slug, -1) + 1
            made.add(f"{slug}-{count}" if count else slug)
    return made


def broken(page: Path, text: str, root: Path) -> list[str]:
    """The relative links of a page, `page` below `root`, that lead nowhere."""
    wrong = []
    for token in tokens(text):
        link = token.attrs.get("href" if token.type == "link_open" else "src")
        if link is None or re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (root / page).parent / name if name else root / page
        if not (target.exists() and target.resolve().is_relative_to(root.resolve())) or (
            anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            wrong.append(link)
    return wrong


def test_pages_are_found():
    assert {Path("README.md"), Path("docs/bundle.md"), Path("models/shapes/README.md")} <= set(pages())


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links(page):
    assert broken(page, (ROOT / page).read_text(encoding="utf-8"), ROOT) == []


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "b.md").write_text("# One `two`: three\n\n## Again\n\n## Again\n")
    good = ["b.md", "b.md#one-two-three", "b.md#again-1", "../docs/b.md", "https://example.org/x#y"]
    bad = ["c.md", "b.md#one", "b.md#again-2", "#here", "../../etc"]
    text = "".join(f"[text]({link}) and `[code](x.md)`\n\n" for link in good + bad) + "![image](no.png)\n"
    (tmp_path / "docs" / "a.md").write_text(text)
    assert broken(Path("docs/a.md"), text, tmp_path) == [*bad, "no.png"]


@pytest.mark.parametrize("page", NAMING)
def test_source_files_that_pages_name_exist(page):
    spans = [t.content for t in tokens((ROOT / page).read_text(encoding="utf-8")) if t.type == "code_inline"]
    names = [s for s in spans if re.fullmatch(r"[\w./-]+(\.(py|cpp|h|toml|md|txt)|/)", s) and "/" in s]
    assert names
    # A name in capitals is a placeholder, as in models/FAMILY.py.
    missing = [n for n in names if not any((ROOT / base / n).exists() for base in BASES) and n == n.lower()]
    assert missing == []
