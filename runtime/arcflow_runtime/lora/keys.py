"""Sort the keys of a LoRA file: key -> the module that it belongs to and its role there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Endings of the factors and of alpha. The module is what stands before. A group is the adapter's name in peft.
_DOWN = (
    r"\.lora_A(?:\.(?P<adapter>[^.]+))?\.weight",
    r"\.lora_down(?:\.(?P<adapter>[^.]+))?\.weight",
    r"\.lora_linear_layer\.down\.weight",
    r"(?:\.|_)lora\.down\.weight",
    r"\.down\.weight",  # XLabs: the module's own name ends in `_lora1`
    r"\.lora_A",
)
_UP = tuple(p.replace("lora_A", "lora_B").replace("down", "up") for p in _DOWN)
_ALPHA = (r"(?:\.lora_A)?\.alpha",)


def _compile(endings: Iterable[str]) -> list[re.Pattern[str]]:
    return [re.compile(rf"(?P<module>.+?){ending}") for ending in endings]


_ROLES = {"down": _compile(_DOWN), "up": _compile(_UP), "alpha": _compile(_ALPHA)}
#: What is in the key of a kind that is not supported -> what to call it. The first that matches counts.
_UNSUPPORTED = {
    re.compile(pattern): kind
    for pattern, kind in (
        (r"dora_scale|lora_magnitude_vector|\.magnitude$", "DoRA"),
        (r"\.lokr_|_lokr_", "LoKr"),
        (r"\.hada_", "LoHa"),
        (r"\.oft_|\.boft_|oft_blocks|oft_diag", "OFT"),
        (r"\.lora_mid\b", "a Tucker factor of a convolution (LoCon)"),
        (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
        (r"\.on_input$", "IA3"),
        (r"\.lora_E\b|\.ranknum\b", "AdaLoRA"),
        (r"lora_embedding_[AB]", "a factor of an embedding"),
        (r"\.lora_[AB](\.[^.]+)?\.bias$|\.lora_(up|down)\.bias$|\.(up|down)\.bias$", "a bias of a factor"),
        (r"^bundle_emb\.|^emb_params$|token_adapter|trainable_tokens", "a trained embedding"),
        (r"\.diff_b$", "a change of a bias"),
        (r"\.diff$", "a change of a whole weight"),
        (r"\.(w_norm|b_norm)$", "a change of a norm"),
        (r"\.set_weight$|\.reshape_weight$", "a weight of another shape"),
        (r"scale_weight|weight_scale|scale_input|scaled_fp8|comfy_quant", "a scale of a quantised file"),
        (r"norm[^.]*\.(weight|bias|scale)$|_norm\.scale$", "a norm"),
        (r"\.running_(mean|var)$|num_batches_tracked", "a batch norm"),
        (r"(\.|^)bias$", "a bias"),
        (r"(\.|^)weight$", "a whole weight"),
    )
}
#: Buffers that old versions of transformers saved with CLIP; they hold 0, 1, 2, ...
_BUFFERS = ("position_ids",)


@dataclass
class Module:
    """The keys of one module of a file."""

    name: str
    down: str | None = None
    up: str | None = None
    alpha: str | None = None


@dataclass
class SortedKeys:
    """The keys of a file: its modules, those of an unsupported kind, unknown ones, and buffers that change nothing.

    `clash` holds two keys with the same role for one module, `adapters` the peft adapters' names, each with a key.
    """

    modules: dict[str, Module] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    clash: tuple[str, str] | None = None
    adapters: dict[str, str] = field(default_factory=dict)


def sort_keys(keys: Iterable[str]) -> SortedKeys:
    """Sort the keys of a file by module and role."""
    found = SortedKeys()
    for key in sorted(keys):
        if key.rpartition(".")[2] in _BUFFERS:
            found.buffers.append(key)
            continue
        # Before the factors: "x.lora_mid.down.weight" or a DoRA's magnitude must not pass for one.
        kind = next((kind for pattern, kind in _UNSUPPORTED.items() if pattern.search(key)), None)
        if kind is not None and (kind != "a whole weight" or not _is_factor(key)):
            found.unsupported[key] = kind
        elif not _add(found, key):
            found.unknown.append(key)
    return found


def _is_factor(key: str) -> bool:
    return any(p.fullmatch(key) for role in ("down", "up") for p in _ROLES[role])


def _add(found: SortedKeys, key: str) -> bool:
    for role, patterns in _ROLES.items():
        for pattern in patterns:
            if (match := pattern.fullmatch(key)) is None:
                continue
            if adapter := match.groupdict().get("adapter"):
                found.adapters.setdefault(adapter, key)
            module = found.modules.setdefault(match["module"], Module(match["module"]))
            other = getattr(module, role)
            if other is not None:
                found.clash = found.clash or (other, key)
            setattr(module, role, key)
            return True
    return False
