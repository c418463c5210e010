"""Read a student file for `arcflow compile`: a preset or TOML file -> checkpoints and options of each stage."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from arcflow_export.errors import SourceError
from arcflow_runtime.disk.parse import parse
from arcflow_runtime.errors import BundleError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "nvfp4"]
#: Options of stages whose value is a file or folder; a relative path starts at the student file's folder.
FILE_OPTIONS = ("--prompts", "--scales", "--judge", "--vae")


@dataclass(frozen=True)
class Arguments:
    """Additional command-line options for each stage."""

    export: str = ""
    calibrate: str = ""
    verify: str = ""
    build: str = ""


_NO_ARGUMENTS = Arguments()


@dataclass(frozen=True)
class _File:
    """The keys of a student file; without `adapter`, the base itself is the student."""

    name: str
    base: str
    adapter: str | None = None
    base_subfolder: str | None = None
    base_revision: str | None = None
    adapter_subfolder: str | None = None
    adapter_revision: str | None = None
    loras: tuple[str, ...] = ()
    precision: Precision = "bf16"
    policy: str | None = None
    arguments: Arguments = _NO_ARGUMENTS


@dataclass(frozen=True)
class Checkpoint:
    """A base, adapter or LoRA: `path` if it is on this machine; None if `name` is a hub id."""

    name: str
    path: Path | None
    subfolder: str | None = None
    revision: str | None = None
    scale: float | None = None


@dataclass(frozen=True)
class StudentFile:
    """A student file with its paths made absolute and its options split into words.

    `adapter` is None for a straight student, the base itself.
    """

    name: str
    base: Checkpoint
    adapter: Checkpoint | None
    loras: tuple[Checkpoint, ...]
    precision: Precision
    policy: str | None
    export: tuple[str, ...]
    calibrate: tuple[str, ...]
    verify: tuple[str, ...]
    build: tuple[str, ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Base, adapter if there is one, and LoRAs."""
        return (self.base, *([] if self.adapter is None else [self.adapter]), *self.loras)


def presets() -> list[str]:
    """Names of the student files that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def load_student_file(name_or_path: str) -> StudentFile:
    """Read a preset by its bare name, or a TOML file.

    A path in the file is looked up in the file's folder, then in the working directory. If it is in neither, it is
    taken as a hub id.

    Raises:
        SourceError: the preset or file does not exist, it is not valid TOML, or a key is unknown, missing or has the
            wrong type.
    """
    known, path = presets(), Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise SourceError(f"{path} does not exist; the presets are {', '.join(known)}")
        folder, data = path.absolute().parent, path.read_bytes()
    elif name_or_path in known:
        folder, data = Path.cwd(), (_folder() / f"{name_or_path}.toml").read_bytes()
    else:
        raise SourceError(
            f"{name_or_path!r} is neither a preset nor a .toml file{_suggest(name_or_path, known)}; "
            f"the presets are {', '.join(known)}"
        )
    try:
        decoded = tomllib.loads(data.decode())
    except ValueError as e:  # both TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise SourceError(f"{name_or_path}: not valid TOML ({e})") from None
    return _resolve(_parse(decoded, name_or_path), folder, name_or_path)


def base_student(name: str) -> StudentFile:
    """A base without an adapter as a student with all defaults; it is named after the last part of `name`.

    Args:
        name: a folder or a hub id.
    """
    last = re.sub(r"[^A-Za-z0-9._-]", "-", Path(name).absolute().name).lstrip("._-")
    return _resolve(_File(last or "base", name), Path.cwd(), "--base")


def _parse(decoded: dict[str, Any], where: str) -> _File:
    arguments = decoded.get("arguments")
    for table, kind, prefix in ((decoded, _File, ""), (arguments, Arguments, "arguments: ")):
        known = [f.name for f in fields(kind)]
        for key in table if isinstance(table, dict) else ():
            if key not in known:
                hint = _suggest(key, known)
                raise SourceError(f"{where}: {prefix}unknown key {key!r}{hint}; the keys are {', '.join(known)}")
    try:
        file: _File = parse(_File, decoded, where)
    except BundleError as e:
        raise SourceError(str(e)) from None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", file.name):
        raise SourceError(
            f"{where}: name must be letters, digits, '.', '_' and '-', as files are named after it, got {file.name!r}"
        )
    if file.adapter is None and (file.adapter_subfolder or file.adapter_revision):
        raise SourceError(f"{where}: adapter_subfolder and adapter_revision need adapter; give it, or leave them out")
    return file


def _resolve(file: _File, folder: Path, where: str) -> StudentFile:
    policy = file.policy
    if policy is not None and policy.endswith(".toml"):
        policy = str(_found(policy, folder) or policy)
    return StudentFile(
        file.name,
        Checkpoint(file.base, _found(file.base, folder), file.base_subfolder, file.base_revision),
        None
        if file.adapter is None
        else Checkpoint(file.adapter, _found(file.adapter, folder), file.adapter_subfolder, file.adapter_revision),
        tuple(_lora(text, folder, where) for text in file.loras),
        file.precision,
        policy,
        _words(file.arguments.export, folder, f"{where}: arguments: export"),
        _words(file.arguments.calibrate, folder, f"{where}: arguments: calibrate"),
        _words(file.arguments.verify, folder, f"{where}: arguments: verify"),
        _words(file.arguments.build, folder, f"{where}: arguments: build"),
    )


def _lora(text: str, folder: Path, where: str) -> Checkpoint:
    name, colon, scale = text.rpartition(":")
    if not colon or _found(text, folder) is not None:  # a colon may belong to the path
        return Checkpoint(text, _found(text, folder), scale=1.0)
    try:
        return Checkpoint(name, _found(name, folder), scale=float(scale))
    except ValueError:
        raise SourceError(f"{where}: loras must be PATH or PATH:SCALE with a number for SCALE, got {text!r}") from None


def _words(text: str, folder: Path, where: str) -> tuple[str, ...]:
    """A stage's options as words, with absolute paths for the files that they name."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise SourceError(f"{where}: {e} in {text!r}") from None
    split = [part for word in words for part in _split(word)]
    for i, option in enumerate(split[:-1]):
        if option in FILE_OPTIONS and (path := folder / split[i + 1]).exists():
            split[i + 1] = str(path)
    return tuple(split)


def _split(word: str) -> Sequence[str]:
    """Split `--option=value` into two words, for options that name files."""
    option, equals, value = word.partition("=")
    return (option, value) if equals and option in FILE_OPTIONS else (word,)


def _found(name: str, folder: Path) -> Path | None:
    """The absolute path if something with this name is on this machine, else None."""
    path = Path(name).expanduser()
    return next((p.absolute() for p in (folder / path, path) if name and p.exists()), None)


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _folder() -> Any:
    return files("arcflow_export") / "pipeline" / "students"
