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
from typing import Any, Literal

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

#: How a weight that is not multiplied in 8 bits is stored.
Storage = Literal["int8", "float16"]
_NEAR = 3
_NO_THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class StoredPolicy:
    """Glob patterns for the names of weights that take fewer bits in the file and are widened before they are used.

    `int8` is for token embeddings, which get one scale per token; `float16` is for any weight of two dimensions or
    more. Weights of quantised linears do not count.
    """

    int8: tuple[str, ...] = ()
    float16: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartPolicy:
    """Glob patterns for the names of one part's linears, as in `fnmatch`: `*` matches dots too.

    A linear is quantised if it matches a pattern of `include` and no pattern of `exclude`. There are no built-in
    exclusions. `formats` has patterns of linears that get another format than the policy's, by that format; None if
    there are none. `stored` is for weights that are not multiplied in the policy's format; None if there are none.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: Mapping[QuantFormat, tuple[str, ...]] | None = None
    stored: StoredPolicy | None = None


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
        for part in data["parts"].values():  # a policy without a newer key has the digest that it always had
            for key in ("formats", "stored"):
                if part[key] is None:
                    del part[key]
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


def select(policy: PartPolicy, part: str, linears: Sequence[str]) -> tuple[str, ...]:
    """Choose the linears of one part that a policy quantises; keeps the order of `linears`.

    Args:
        policy: the policy's patterns for this part.
        part: name of the part, for messages.
        linears: names of the part's linears.

    Raises:
        QuantizeError: a pattern matches no linear (the message suggests similar names), or `exclude` removes every
            linear that `include` matched.
    """
    others = {f"formats.{name}": patterns for name, patterns in (policy.formats or {}).items()}
    for key, patterns in ({"include": policy.include, "exclude": policy.exclude} | others).items():
        for pattern in patterns:
            if not _matches_any(pattern, linears):
                raise QuantizeError(
                    f"policy: parts.{part}.{key}: {pattern!r} matches none of the {len(linears)} linears of {part}"
                    f"{_near(pattern, linears)}"
                )
    chosen = tuple(name for name in linears if _matches(name, policy.include) and not _matches(name, policy.exclude))
    if not chosen:
        raise QuantizeError(f"policy: parts.{part} excludes every linear that it includes; leave the part out instead")
    return chosen


def select_formats(policy: PartPolicy, part: str, linears: Sequence[str], usual: QuantFormat) -> dict[str, QuantFormat]:
    """The linears of `select` with their formats: `usual`, or that of `policy.formats` whose pattern a linear matches.

    Raises:
        QuantizeError: as `select`, or a linear matches patterns of two formats.
    """
    found = {}
    for name in select(policy, part, linears):
        others = [other for other, patterns in (policy.formats or {}).items() if _matches(name, patterns)]
        if len(others) > 1:
            raise QuantizeError(f"policy: parts.{part}.formats: {name!r} must match one format, got {others}")
        found[name] = others[0] if others else usual
    return found


def select_stored(
    policy: PartPolicy, part: str, weights: Sequence[str], embeddings: Sequence[str]
) -> dict[str, Storage]:
    """Choose the weights that a policy stores in fewer bits; keeps the order of `weights`.

    Args:
        policy: the policy's patterns for this part.
        part: name of the part, for messages.
        weights: names of the part's weights that are not those of quantised linears.
        embeddings: those of `weights` that are token embeddings.

    Raises:
        QuantizeError: a pattern matches no weight, or a weight matches patterns of both keys.
    """
    found: dict[str, Storage] = {}
    if policy.stored is None:
        return found
    patterns: dict[Storage, tuple[tuple[str, ...], Sequence[str], str]] = {
        "int8": (policy.stored.int8, embeddings, "token embeddings of {part}"),
        "float16": (policy.stored.float16, weights, "weights of {part} that are not quantised"),
    }
    for storage, (wanted, names, what) in patterns.items():
        for pattern in wanted:
            if not _matches_any(pattern, names):
                raise QuantizeError(
                    f"policy: parts.{part}.stored.{storage}: {pattern!r} matches none of the {len(names)} "
                    f"{what.format(part=part)}{_near(pattern, names)}"
                )
    for name in weights:
        chosen = [
            storage for storage, (wanted, names, _) in patterns.items() if name in names and _matches(name, wanted)
        ]
        if len(chosen) > 1:
            raise QuantizeError(f"policy: parts.{part}.stored: {name!r} must match one of int8 and float16, got both")
        if chosen:
            found[name] = chosen[0]
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


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
        if not patterns.include and (patterns.stored is None or patterns.exclude or patterns.formats):
            raise QuantizeError(f"{where}: parts.{part}: include must have at least one pattern; or leave the part out")
        if patterns.stored is not None and not (patterns.stored.int8 or patterns.stored.float16):
            raise QuantizeError(
                f"{where}: parts.{part}: stored must have patterns for int8 or float16; or leave it out"
            )
    for name, value in dataclasses.asdict(policy.thresholds).items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise QuantizeError(f"{where}: thresholds: {name} must be finite and not negative, got {value!r}")


def _folder() -> Any:
    return files("arcflow_export") / "formats" / "policies"
