"""The table of LoRA files' names by model family; the key is the manifest's `family`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora import flux, qwen
from arcflow_runtime.lora.target import Entry


@dataclass(frozen=True)
class LoraFamily:
    """How LoRA files name the linears of one family.

    Args:
        title: the model's name in messages.
        option: the model's name on the command line.
        entries: every spelling of every linear.
        comfy: ComfyUI's prefixes of the text encoders -> component.
        modulation: endings of the linears that compute modulation, which are in the conditioner.
        layer_prefixes: by text encoder, what its checkpoints may have before a linear's name: the one of our names
            first.
        architectures: beginnings of the model's name in a file's metadata, in lower case, without separators.
    """

    title: str
    option: str
    entries: Callable[[], Iterator[Entry]]
    comfy: Mapping[str, str]
    modulation: tuple[str, ...]
    layer_prefixes: Mapping[str, tuple[str, ...]]
    architectures: tuple[str, ...]


FAMILIES: dict[str, LoraFamily] = {
    "flux": LoraFamily(
        title="FLUX.1",
        option="flux",
        entries=flux.entries,
        comfy={
            "text_encoders.clip_l.transformer.": "text_encoder",
            "text_encoders.clip_l.": "text_encoder",
            "text_encoders.t5xxl.transformer.": "text_encoder_2",
            "text_encoders.t5xxl.": "text_encoder_2",
        },
        modulation=("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear"),
        layer_prefixes={"text_encoder": ("text_model.", "")},
        architectures=("flux1",),
    ),
    "qwen-image": LoraFamily(
        title="Qwen-Image",
        option="qwen",
        entries=qwen.entries,
        comfy={"text_encoders.qwen25_7b.transformer.": "text_encoder", "text_encoders.qwen25_7b.": "text_encoder"},
        modulation=(".img_mod.1", ".txt_mod.1", "norm_out.linear"),
        layer_prefixes={"text_encoder": qwen.LANGUAGE},
        architectures=("qwenimage",),
    ),
}


def lora_family(family: str) -> LoraFamily:
    """The entry of a family.

    Raises:
        LoraError: the family is not in the table.
    """
    if family not in FAMILIES:
        raise LoraError(f"LoRA: the model's family must be one of {list(FAMILIES)}, got {family!r}; update arcflow")
    return FAMILIES[family]
