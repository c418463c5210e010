"""mkdocs hooks: the site has the repository's own pages where they lie, and the help text of every command.

Pages link to each other, to sources and to pictures by relative paths that work on GitHub. So the site is made of the
whole repository's pages, not of `docs/` alone, and of the files that these link to.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)", re.DOTALL)
_COMMANDS = "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of `docs/` by every committed page and what the pages link to; the theme's own files stay."""
    committed = set(_git("ls-files", "--cached", "--others", "--exclude-standard").splitlines())
    names = {name for name in committed if name.endswith(".md")}
    for page in sorted(names):
        for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            names.add(os.path.normpath(os.path.join(os.path.dirname(page), link)))
    docs = Path(config.docs_dir)
    kept = [f for f in files if f.abs_src_path is None or not Path(f.abs_src_path).is_relative_to(docs)]
    made = [File.generated(config, name, abs_src_path=str(ROOT / name)) for name in sorted(names & committed)]
    return Files([*kept, *made])


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put the help texts where the reference asks for them."""
    return markdown.replace(_COMMANDS, _help_texts()) if page.file.src_uri == "docs/reference.md" else markdown


def _help_texts() -> str:
    overview = _arcflow("--help")
    names = re.findall(r"^  (\S+)", overview, re.MULTILINE)
    return "\n\n".join(f"### arcflow {name}\n\n```text\n{_arcflow(name, '--help').rstrip()}\n```" for name in names)


def _arcflow(*arguments: str) -> str:
    command = [sys.executable, "-m", "arcflow_runtime.cli", *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "100"}
    ).stdout


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
