"""Compare a LoRA with a bundle: `LoraFile`, bundle -> the layers that do not fit it, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import MODULATION
from arcflow_runtime.errors import BundleError, LoraError
from arcflow_runtime.lora.families import lora_family
from arcflow_runtime.lora.layers import LoraFile, LoraLayer
from arcflow_runtime.lora.names import spellings


@dataclass(frozen=True)
class Misfit:
    """Why a layer does not fit; `harmless` is True if the model's output does not depend on it."""

    reason: str
    harmless: bool = False


def misfits(lora: LoraFile, bundle: Bundle) -> dict[tuple[str, str], Misfit]:
    """The layers of `lora` that the bundle has no linear for, or one of another size, by part and linear.

    Raises:
        LoraError: the bundle is of another family.
        BundleError: a weights file of the bundle is damaged.
    """
    family = bundle.manifest.family
    if family != lora.family:
        raise LoraError(
            f"LoRA: {lora.path} was read as one for {lora_family(lora.family).title}, the bundle is "
            f"{lora_family(family).title}; give a LoRA for this model"
        )
    found: dict[tuple[str, str], Misfit] = {}
    sizes: dict[str, Mapping[str, tuple[int, ...]]] = {}
    for (part, name), layer in lora.layers.items():
        if part not in bundle.manifest.parts:
            slots = bundle.manifest.slots().get(MODULATION)
            if slots is not None and name in slots.layers:
                size = slots.layers[name]
                if misfit := _misfit(layer, {name: (size.in_features, size.out_features)}, (name,), MODULATION):
                    found[part, name] = misfit
                continue
            found[part, name] = Misfit(f"the bundle has no {part}: its results are stored as a table")
            continue
        if part not in sizes:
            sizes[part] = _linears(bundle, part)
        if misfit := _misfit(layer, sizes[part], spellings(lora.family, part, name), part):
            found[part, name] = misfit
    return found


def _misfit(layer: LoraLayer, sizes: Mapping[str, tuple[int, ...]], names: tuple[str, ...], part: str) -> Misfit | None:
    size = next((sizes[name] for name in names if name in sizes), None)
    got = (layer.in_features, layer.out_features)
    if size is None:
        # In Qwen-Image's last block, the text stream's results are not used, and the bundle has no linears for them.
        block = re.match(r".*?blocks\.\d+\.", names[0])
        if block and any(name.startswith(block[0]) for name in sizes):
            return Misfit("the model does not use its result, so it changes nothing", harmless=True)
        return Misfit(f"the bundle's {part} has no such linear")
    if size != got:
        return Misfit(f"the linear is [{size[0]}, {size[1]}], the LoRA's [{got[0]}, {got[1]}]: it is for another model")
    return None


def _linears(bundle: Bundle, part: str) -> dict[str, tuple[int, ...]]:
    """Linear -> [in, out], from the header of the part's weights file."""
    path = bundle.path(bundle.manifest.parts[part].weights)
    try:
        with safe_open(path, framework="numpy") as f:
            shapes = {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as e:
        raise BundleError(f"{path} is not a valid safetensors file ({e}); export again") from None
    return {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}
