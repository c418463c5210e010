"""Find the scale of every module: its alpha key, the file's metadata or adapter_config.json -> scale and its source.

peft's rules (LoraConfig): scale = alpha / r, or alpha / sqrt(r) with rsLoRA; alpha is that of the first key of
`alpha_pattern` that is, as a regular expression, the end of the module's name. Kohya's scripts: scale = alpha / r with
the tensor `<module>.alpha`, else the metadata's `ss_network_alpha`. Without any alpha the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora.names import COMPONENTS

ADAPTER_CONFIG = "adapter_config.json"
#: diffusers' key of the metadata, which holds a LoraConfig per component as JSON.
_DIFFUSERS = "lora_adapter_metadata"
_KOHYA = "ss_network_alpha"
_MAX_CONFIG_BYTES = 16 << 20
#: The settings of a LoraConfig that say what the scale is.
_SETTINGS = ("lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora")
#: Settings that change what the factors mean -> what to call them.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of the factors",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "Activated LoRA",
    "layer_replication": "replicated layers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow",
    "modules_to_save": "whole modules (modules_to_save)",
    "target_parameters": "parameters that are not linears (target_parameters)",
    "trainable_token_indices": "trained tokens",
}
#: Ways to make the first factors that also change the base's weights.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: An alpha tensor may be in bfloat16, which rounds by up to 2^-9 of the number.
_SAME = 2**-8
#: A pattern comes from the file, and Python's regular expressions can take for ever.
_MAX_PATTERN, _MAX_REPEATS = 300, 3


@dataclass(frozen=True)
class Scale:
    """The scale of one module, with the alpha that it comes from (None if there is none) and where that was read."""

    value: float
    alpha: float | None
    source: str


@dataclass(frozen=True)
class _Statement:
    """What one place says: `settings` of a LoraConfig. It holds for `component`, or for all if that is None."""

    where: str
    component: str | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Alpha:
    value: float
    where: str
    short: str | None = None


class Scales:
    """Everything that a file says about scales, apart from its alpha tensors."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        """Read the metadata, and the adapter_config.json beside the file.

        Args:
            path: the LoRA file.
            metadata: of the file.

        Raises:
            LoraError: something is not JSON, or says that this is not a plain LoRA.
        """
        self._path = path
        self._kohya = metadata.get(_KOHYA)
        self._matched: set[tuple[str, str, str]] = set()
        self.config = _find_config(path)
        self._statements = [*_diffusers(path, metadata), *_plain(path, metadata)]
        if self.config is not None:
            self._statements.append(_Statement(ADAPTER_CONFIG, None, _read_config(self.config)))
        for statement in self._statements:
            self._check(statement)

    def of(self, component: str, names: Sequence[str], rank: int, own: tuple[str, float] | None) -> Scale:
        """The scale of one module.

        Args:
            component: of the checkpoint.
            names: the module's names that a pattern may mean, the file's first.
            rank: of its factors.
            own: the key and value of its alpha tensor, None if it has none.

        Raises:
            LoraError: two places disagree, or a number is not one.
        """
        alphas = [] if own is None else [_Alpha(own[1], f"key {own[0]!r}", "its own tensor")]
        roots = {}
        for statement in self._statements:
            if statement.component in (None, component):
                alphas += self._alpha(statement, names, rank, own is not None)
                if "use_rslora" in statement.settings:
                    roots[statement.where] = bool(statement.settings["use_rslora"])
        if own is None and self._kohya is not None and not (alphas and self._kohya == "Dynamic"):
            where = f"the metadata's {_KOHYA}"
            alphas.append(_Alpha(self._number(self._kohya, where), where))
        if len(set(roots.values())) > 1:
            raise LoraError(
                f"LoRA: {self._path}: use_rslora is true in one and false in the other of {' and '.join(roots)}; "
                "correct one of them"
            )
        rslora = any(roots.values())
        divisor, sign = (math.sqrt(rank), f"sqrt({rank})") if rslora else (float(rank), str(rank))
        if not alphas:
            return Scale(1.0, None, "no alpha stated")
        first = alphas[0]
        for other in alphas[1:]:
            if not math.isclose(first.value, other.value, rel_tol=_SAME):
                raise LoraError(
                    f"LoRA: {self._path}: alpha of {names[0]} is {first.value:g} by {first.where} and {other.value:g} "
                    f"by {other.where}; correct one of them"
                )
        return Scale(
            first.value / divisor, first.value, f"alpha {first.value:g} ({first.short or first.where}) / {sign}"
        )

    def unmatched(self) -> list[str]:
        """The patterns that no module matched so far, each with its place."""
        return [
            f"{setting} {pattern!r} in {statement.where}"
            for statement in self._statements
            for setting in ("alpha_pattern", "rank_pattern")
            for pattern in statement.settings.get(setting) or {}
            if (statement.where, setting, pattern) not in self._matched
        ]

    def check_kohya(self, alphas: Mapping[str, float]) -> None:
        """Compare the metadata's `ss_network_alpha` with the file's alpha tensors, by key.

        It is the default of all modules: single ones may have another alpha, and after a resize it is "Dynamic".

        Raises:
            LoraError: no tensor has that value.
        """
        try:
            default = float(self._kohya or "")
        except ValueError:
            return
        if alphas and not any(math.isclose(default, value, rel_tol=_SAME) for value in alphas.values()):
            key, value = next(iter(alphas.items()))
            raise LoraError(
                f"LoRA: {self._path}: alpha is {value:g} by key {key!r} and {default:g} by the metadata's {_KOHYA}; "
                "correct one of them"
            )

    def _alpha(self, statement: _Statement, names: Sequence[str], rank: int, own: bool) -> list[_Alpha]:
        """The alpha that a statement gives a module, in a list that is empty if it says nothing about scales."""
        settings, where = statement.settings, statement.where
        r = self._match(statement, "rank_pattern", names)
        stated = settings.get("r") if r is None else r
        if stated is not None and self._number(stated, f"r in {where}") != rank:
            raise LoraError(
                f"LoRA: {self._path}: the factors of {names[0]} have rank {rank}, {where} says r {stated}; "
                "save the LoRA again"
            )
        found = self._match(statement, "alpha_pattern", names)
        if found is not None:
            return [_Alpha(self._number(found, f"alpha_pattern in {where}"), f"alpha_pattern in {where}")]
        if "lora_alpha" in settings:
            return [_Alpha(self._number(settings["lora_alpha"], f"lora_alpha in {where}"), f"lora_alpha in {where}")]
        if own or not any(name in settings for name in _SETTINGS):
            return []
        raise LoraError(f"LoRA: {self._path}: {where} must state lora_alpha, it has only {', '.join(settings)}")

    def _match(self, statement: _Statement, setting: str, names: Sequence[str]) -> Any:
        """The value of the first pattern that is the end of one of the names; None if there is none."""
        for pattern, value in (statement.settings.get(setting) or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                self._matched.add((statement.where, setting, pattern))
                return value
        return None

    def _check(self, statement: _Statement) -> None:
        where = f"LoRA: {self._path}: {statement.where}"
        for name, kind in _REFUSED.items():
            if statement.settings.get(name):
                raise LoraError(f"{where} sets {name}: {kind} is not supported; give a plain LoRA")
        if statement.settings.get("bias", "none") not in ("none", None):
            raise LoraError(f"{where} sets bias: trained biases are not supported; give a plain LoRA")
        kind = statement.settings.get("peft_type", "LORA")
        if kind not in ("LORA", None):
            raise LoraError(f"{where} says peft_type {kind!r}, it must be 'LORA'; give a plain LoRA")
        start = str(statement.settings.get("init_lora_weights", "")).lower()
        if start.startswith(_CHANGED_BASE):
            raise LoraError(
                f"{where} says init_lora_weights {start!r}, which also changed the base's weights; convert it to a "
                "plain LoRA with peft's path_initial_model_for_weight_conversion"
            )
        for setting in ("alpha_pattern", "rank_pattern"):
            patterns = statement.settings.get(setting) or {}
            if not isinstance(patterns, dict):
                raise LoraError(f"{where}: {setting} must be an object, got {patterns!r:.60}")
            for pattern in patterns:
                _check_pattern(pattern, f"{where}: {setting}")

    def _number(self, value: Any, what: str) -> float:
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise LoraError(
                f"LoRA: {self._path}: {what} must be a finite number, got {value!r:.60}; save the LoRA again"
            )
        return number


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse patterns that could take for ever: a repeated group, or many repetitions."""
    repeats = re.findall(r"(?<!\\)[*+?{]", pattern)
    if len(pattern) > _MAX_PATTERN or len(repeats) > _MAX_REPEATS or re.search(r"\)[*+?{]", pattern):
        raise LoraError(f"{where}: the pattern {pattern!r:.60} is too complex; name the modules one by one")
    try:
        re.compile(pattern)
    except re.error as e:
        raise LoraError(f"{where}: {pattern!r:.60} is not a regular expression ({e}); save the LoRA again") from None


def _diffusers(path: Path, metadata: Mapping[str, str]) -> list[_Statement]:
    """What diffusers writes: one JSON object with `<component>.<setting>`; older tools leave the component out."""
    text = metadata.get(_DIFFUSERS)
    if not text:
        return []
    where = f"the metadata's {_DIFFUSERS}"
    data = _json(text, f"LoRA: {path}: its metadata {_DIFFUSERS}")
    return _by_component(data, where)


def _plain(path: Path, metadata: Mapping[str, str]) -> list[_Statement]:
    """Settings that stand in the metadata by themselves, as text: `lora_alpha`, `transformer.lora_alpha`."""
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        component, _, name = key.rpartition(".")
        if component in ("", *COMPONENTS) and name in (*_SETTINGS, "use_dora"):
            found[key] = _value(text)
    return _by_component(found, "the metadata")


def _find_config(path: Path) -> Path | None:
    """peft's file beside the weights. It belongs to adapter_model.safetensors if the folder has that."""
    config, named = path.parent / ADAPTER_CONFIG, path.parent / "adapter_model.safetensors"
    return config if config.is_file() and (path.name == named.name or not named.exists()) else None


def _read_config(config: Path) -> dict[str, Any]:
    if config.stat().st_size > _MAX_CONFIG_BYTES:
        raise LoraError(f"LoRA: {config} must have at most {_MAX_CONFIG_BYTES} bytes, got {config.stat().st_size}")
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise LoraError(f"LoRA: {config} is not valid UTF-8 ({e}); save the LoRA again") from None
    return _json(text, f"LoRA: {config}")


def _by_component(data: Mapping[str, Any], where: str) -> list[_Statement]:
    """Group `<component>.<setting>`, nested objects by component, and settings without a component."""
    groups: dict[str | None, dict[str, Any]] = {}
    for key, value in data.items():
        component, _, name = key.partition(".")
        if component in COMPONENTS and name:
            groups.setdefault(component, {})[name] = value
        elif key in COMPONENTS and isinstance(value, dict):
            groups.setdefault(key, {}).update(value)
        else:
            groups.setdefault(None, {})[key] = value
    return [
        _Statement(where if component is None else f"{where} ({component})", component, settings)
        for component, settings in groups.items()
    ]


def _json(text: str, what: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise LoraError(f"{what} is not valid JSON ({e}); save the LoRA again") from None
    if not isinstance(data, dict):
        raise LoraError(f"{what} must hold a JSON object, got {type(data).__name__}; save the LoRA again")
    return data


def _value(text: str) -> Any:
    """A setting that is stored as text; Python's and JSON's spellings of true, false and null are the same here."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
