"""Translate a module's name in a LoRA file -> component and linear of the checkpoint.

Dots and underscores are the same here: Kohya's scripts and OneTrainer write `double_blocks_0_img_attn_qkv`, ComfyUI and
the models' authors `double_blocks.0.img_attn.qkv`. No two names of a family differ by these only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from arcflow_runtime.lora.families import lora_family
from arcflow_runtime.lora.target import Target

#: What tools put before a module's name, whatever the component: peft, DistributedDataParallel, torch.compile.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
#: Prefix -> component. Kohya's scripts call T5 te3, OneTrainer te2.
_PREFIXES = {
    "transformer.": "transformer",
    "model.diffusion_model.": "transformer",
    "diffusion_model.": "transformer",
    "lora_transformer_": "transformer",
    "lora_unet_": "transformer",
    "lycoris_": "transformer",
    "text_encoder.": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_2",
}
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
_NUMBER = re.compile(r"_(\d{1,4})_")


def split_prefix(module: str, family: str) -> tuple[str | None, str]:
    """Remove prefixes: a module as the file calls it -> the component it says, None if it says none, and the name."""
    component: str | None = None
    prefixes: dict[str, str | None] = {**dict.fromkeys(_WRAPPERS), **_PREFIXES, **lora_family(family).comfy}
    while found := next((p for p in prefixes if module.startswith(p)), None):
        component = prefixes[found] or component
        module = module.removeprefix(found)
    return component, module


def find(module: str, family: str) -> Target | None:
    """The linears that a module of a LoRA file changes; None if the family has no linear of that name.

    Args:
        module: as the file calls it.
        family: of the model.
    """
    component, name = split_prefix(module, family)
    # diffusers' attention processors held the factors before peft's layers did.
    flat = _flat(name.replace(".attn.processor.", ".attn."))
    number = _NUMBER.search(flat)
    if number:
        flat = f"{flat[: number.start()]}_{{i}}_{flat[number.end() :]}"
    table = _table(family)
    found = next((table[c, flat] for c in ([component] if component else COMPONENTS) if (c, flat) in table), None)
    if found is None or number is None:
        return found
    block = str(int(number.group(1)))
    return Target(found.component, tuple(n.replace("{i}", block) for n in found.names), found.split, found.swapped)


def part_of(family: str, component: str, name: str) -> str:
    """The part of a bundle that has the linear `name` of a checkpoint's component."""
    if component != "transformer":
        return component
    modulation = name.startswith("time_text_embed.") or name.endswith(lora_family(family).modulation)
    return "conditioner" if modulation else "backbone"


def spellings(family: str, part: str, name: str) -> tuple[str, ...]:
    """Every name that linear `name` of `part` may have in a checkpoint and a bundle, the usual one first.

    Depending on the version of transformers that wrote it, a text encoder's checkpoint has other prefixes.
    """
    first, *others = lora_family(family).layer_prefixes.get(part, ("",))
    return name, *(f"{prefix}{name.removeprefix(first)}" for prefix in others)


def _flat(name: str) -> str:
    return name.replace(".", "_")


@cache
def _table(family: str) -> Mapping[tuple[str, str], Target]:
    """Component and flat name -> target."""
    return {(target.component, _flat(name)): target for name, target in lora_family(family).entries()}
