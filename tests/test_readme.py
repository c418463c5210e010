"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from tests.conftest import SHAPES_OPTIONS

README = Path(__file__).parent.parent / "README.md"


def test_example(bundles, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shapes-fp32").symlink_to(bundles("shapes", **SHAPES_OPTIONS))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open(tmp_path / "picture.png").size == (64, 64)


def test_files_named_in_the_table_exist():
    root = README.parent
    for line in README.read_text().splitlines():
        if line.startswith("|") and "`" in line:
            names = re.findall(r"`([\w/]+(?:\.py|/))`", line)
            folder = root / names[0] if names[0].endswith("/") else (root / names[0]).parent
            assert all((root / n).exists() or (folder / n).exists() for n in names), line
