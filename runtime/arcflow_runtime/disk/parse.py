"""Parse JSON into dataclasses, strictly: a decoded value and a type -> an instance, or an error that names the key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from arcflow_runtime.errors import BundleError

_T = TypeVar("_T")


def read_json(text: bytes) -> Any:
    """Decode JSON and reject duplicate keys (B2).

    Raises:
        ValueError: `text` is not JSON, or an object has a key twice.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"an object has the key {key!r} twice")
        value[key] = item
    return value


def parse(kind: Any, value: Any, where: str) -> Any:
    """Build an instance of `kind` (a dataclass, container or scalar type) from a decoded JSON value.

    Raises:
        BundleError: `value` is not of this type or has unknown keys (B2); the message starts with `where`.
    """
    origin = get_origin(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin is Literal:
        if value not in get_args(kind) or isinstance(value, bool):
            raise BundleError(f"{where} must be one of {list(get_args(kind))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} must be a list, got {value!r}")
        return tuple(parse(get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping or origin is get_origin(Mapping[str, str]):
        if not isinstance(value, dict):
            raise BundleError(f"{where} must be an object, got {value!r}")
        return {k: parse(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if get_args(kind):  # a union, such as int | str or X | None
        for option in get_args(kind):
            if option is type(None):
                if value is None:
                    return None
            elif isinstance(option, type) and dataclasses.is_dataclass(option):
                return _parse_dataclass(option, value, where) if value is not None else None
            elif get_origin(option) is not None:
                if value is not None:
                    return parse(option, value, where)
            elif _is_scalar(option, value):
                return value
        raise BundleError(f"{where} must be of type {kind}, got {value!r}")
    if not _is_scalar(kind, value):
        raise BundleError(f"{where} must be of type {kind.__name__}, got {value!r}")
    return float(value) if kind is float else value


def _is_scalar(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, kind)


def _parse_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    if not isinstance(value, dict):
        raise BundleError(f"{where} must be an object, got {value!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(value.keys() - fields.keys()):
        raise BundleError(f"{where}: unknown keys {unknown}; known are {sorted(fields)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - value.keys()):
        raise BundleError(f"{where}: missing keys {missing}")
    hints = get_type_hints(kind)
    return kind(**{k: parse(hints[k], v, f"{where}: {k}") for k, v in value.items()})
