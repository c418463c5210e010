"""Read a quantisation policy: a preset's name or a TOML file -> which linears to quantise, and the drift thresholds.

`arcflow quantize` uses the patterns, `arcflow verify --against` the thresholds.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any

from arcflow_export.errors import QuantizeError
from arcflow_export.families import facts
from arcflow_export.formats.thresholds import Thresholds
from arcflow_runtime.disk.families import Family
from arcflow_runtime.disk.manifest import QuantFormat, seal
from arcflow_runtime.disk.parse import parse
from arcflow_runtime.disk.quant_formats import BY_OPTION, FORMATS
from arcflow_runtime.errors import BundleError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NEAR = 3
_NO_THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class PartPolicy:
    """Glob patterns for the names of one part's linears, as in `fnmatch`: `*` matches dots too.

    A linear is quantised if it matches a pattern of `include` and no pattern of `exclude`. There are no built-in
    exclusions. `formats` has patterns of linears that get another format than the policy's, by that format; None if
    there are none.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    formats: Mapping[QuantFormat, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class QuantizationPolicy:
    """The contents of a policy file: its name, the number format, the patterns by part, and the drift thresholds."""

    name: str
    format: QuantFormat
    parts: Mapping[str, PartPolicy]
    thresholds: Thresholds = _NO_THRESHOLDS

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """The policy's format, and the others that its parts name."""
        others = (name for part in self.parts.values() for name in part.formats or {})
        return tuple(dict.fromkeys((self.format, *others)))

    def digest(self) -> str:
        """SHA-256 of the policy in canonical JSON; the manifest of a quantised bundle records it."""
        data = json.loads(json.dumps(dataclasses.asdict(self)))
        for part in data["parts"].values():  # a policy of one format has the digest that it always had
            if part["formats"] is None:
                del part["formats"]
        return seal(data)


def presets() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def default_policy(family: Family, option: str | None) -> str:
    """The family's preset for a format, given by its name on the command line; see `preset_for`."""
    return preset_for(facts(family).policy, option)


def preset_for(name: str, option: str | None) -> str:
    """The preset for a format: `flux` for FP8, `flux-int8` for int8."""
    return name if option in (None, "fp8") else f"{name}-{option}"


def load_policy(name_or_path: str, option: str | None = None) -> QuantizationPolicy:
    """Read a preset by its bare name, or a TOML file.

    Args:
        name_or_path: a preset, or a path that ends in .toml.
        option: a format by its name on the command line, in place of the file's own.

    Raises:
        QuantizeError: the preset or file does not exist, it is not valid TOML, or a key is unknown, missing or out of
            range.
    """
    known = presets()
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise QuantizeError(f"--policy: {path} is not a file; the presets are {', '.join(known)}")
        data = path.read_bytes()
    elif name_or_path in known:
        data = (_folder() / f"{name_or_path}.toml").read_bytes()
    else:
        close = difflib.get_close_matches(name_or_path, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise QuantizeError(
            f"--policy: {name_or_path!r} is neither a preset nor a .toml file{hint}; the presets are {', '.join(known)}"
        )
    try:
        decoded = tomllib.loads(data.decode())
    except ValueError as e:  # both TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise QuantizeError(f"{name_or_path}: not valid TOML ({e})") from None
    try:
        policy: QuantizationPolicy = parse(QuantizationPolicy, decoded, name_or_path)
    except BundleError as e:
        raise QuantizeError(str(e)) from None
    _check(policy, name_or_path)
    return policy if option is None else dataclasses.replace(policy, format=BY_OPTION[option])


def select(policy: PartPolicy, part: str, linears: Sequence[str], usual: QuantFormat) -> dict[str, QuantFormat]:
    """Choose the linears of one part that a policy quantises, and their formats; keeps the order of `linears`.

    Args:
        policy: the policy's patterns for this part.
        part: name of the part, for messages.
        linears: names of the part's linears.
        usual: the policy's format.

    Raises:
        QuantizeError: a pattern matches no linear (the message suggests similar names), a linear matches patterns of two
            formats, or `exclude` removes every linear that `include` matched.
    """
    others = policy.formats or {}
    lists = {"include": policy.include, "exclude": policy.exclude}
    for key, patterns in (lists | {f"formats.{name}": patterns for name, patterns in others.items()}).items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise QuantizeError(
                    f"policy: parts.{part}.{key}: {pattern!r} matches none of the {len(linears)} linears of {part}"
                    f"{_near(pattern, linears)}"
                )
    chosen = {}
    for name in linears:
        if _matches(name, policy.include) and not _matches(name, policy.exclude):
            found = [other for other, patterns in others.items() if _matches(name, patterns)] or [usual]
            if len(found) > 1:
                raise QuantizeError(f"policy: parts.{part}.formats: {name!r} must match one format, got {found}")
            chosen[name] = found[0]
    if not chosen:
        raise QuantizeError(f"policy: parts.{part} excludes every linear that it includes; leave the part out instead")
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _near(pattern: str, linears: Sequence[str]) -> str:
    """A hint with names similar to `pattern`; for a pattern with wildcards, block numbers are shown as `*`."""
    wild = any(c in pattern for c in "*?[")
    names = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) if wild else name: None for name in linears}
    close = difflib.get_close_matches(pattern, list(names), _NEAR, 0.5)
    return f"; similar names are {', '.join(map(repr, close))}" if close else ""


def _check(policy: QuantizationPolicy, where: str) -> None:
    if not policy.parts:
        raise QuantizeError(f"{where}: parts must name at least one part, such as [parts.backbone]")
    for part, patterns in policy.parts.items():
        if unknown := sorted((patterns.formats or {}).keys() - FORMATS.keys()):
            raise QuantizeError(f"{where}: parts.{part}: formats must be among {list(FORMATS)}, got {unknown}")
        if not patterns.include:
            raise QuantizeError(f"{where}: parts.{part}: include must have at least one pattern; or leave the part out")
    for name, value in dataclasses.asdict(policy.thresholds).items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise QuantizeError(f"{where}: thresholds: {name} must be finite and not negative, got {value!r}")


def _folder() -> Any:
    return files("arcflow_export") / "formats" / "policies"
