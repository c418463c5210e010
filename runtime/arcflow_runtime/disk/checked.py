"""Open a bundle and hash every file, with a progress bar on a terminal: a directory -> a `Bundle`."""

from __future__ import annotations

from pathlib import Path

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import ENGINES, MANIFEST


def open_checked(root: Path) -> Bundle:
    """Open the bundle in directory `root` with `check="full"`; raises as `Bundle.open` does."""
    from tqdm import tqdm

    files = [p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] not in (MANIFEST, ENGINES)]
    total = sum(p.stat().st_size for p in files)
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, delay=1, disable=None) as bar:
        return Bundle.open(root, "full", bar.update)
