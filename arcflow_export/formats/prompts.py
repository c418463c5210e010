"""Read the prompts that calibration and the drift gate use: a preset's name or a text file -> prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from arcflow_export.errors import CalibrationError
from arcflow_export.formats.scales import PromptSet

_FOLDER = Path(__file__).parent / "prompt_sets"
#: `prompt_sets/README.md` says where these prompts come from.
PRESETS = ("general", "shapes")


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order in which they are used, and the name of their preset or file."""

    name: str
    texts: tuple[str, ...]

    @property
    def record(self) -> PromptSet:
        """The entry that describes these prompts in a scales file."""
        sha = hashlib.sha256("".join(f"{text}\n" for text in self.texts).encode()).hexdigest()
        return PromptSet(self.name, sha, len(self.texts))


def read_prompts(name: str, limit: int | None = None) -> Prompts:
    """Read a preset or a UTF-8 file with one prompt per line; empty lines are skipped.

    Args:
        name: a preset's name, or a path.
        limit: use only the first `limit` prompts; None uses all.

    Raises:
        CalibrationError: the preset or file does not exist, is not UTF-8, or holds no prompt.
    """
    path = _FOLDER / f"{name}.txt" if name in PRESETS else Path(name)
    if not path.is_file():
        raise CalibrationError(
            f"--prompts: must be {', '.join(PRESETS)} or a file with one prompt per line, got {name!r}; "
            "there is no such file"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise CalibrationError(f"--prompts: {path} is not UTF-8 text; save it as UTF-8") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise CalibrationError(f"--prompts: {path} is empty; write one prompt per line")
    return Prompts(path.stem if name in PRESETS else path.name, tuple(texts[:limit]))
