"""Compare a LoRA with a bundle: `LoraFile`, bundle -> the layers that do not fit it, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError, safe_open

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.errors import BundleError, LoraError
from arcflow_runtime.lora.families import lora_family
from arcflow_runtime.lora.layers import LoraFile, LoraLayer
from arcflow_runtime.lora.names import spellings


def misfits(lora: LoraFile, bundle: Bundle) -> dict[tuple[str, str], str]:
    """The layers of `lora` that the bundle has no linear for, or one of another size: part and linear -> the reason.

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
    found = {}
    sizes: dict[str, Mapping[str, tuple[int, ...]]] = {}
    for (part, name), layer in lora.layers.items():
        if part not in bundle.manifest.parts:
            found[part, name] = f"the bundle has no {part}: its results are stored as a table"
            continue
        if part not in sizes:
            sizes[part] = _linears(bundle, part)
        if reason := _misfit(layer, sizes[part], spellings(lora.family, part, name), part):
            found[part, name] = reason
    return found


def _misfit(layer: LoraLayer, sizes: Mapping[str, tuple[int, ...]], names: tuple[str, ...], part: str) -> str | None:
    size = next((sizes[name] for name in names if name in sizes), None)
    if size is None:
        return f"the bundle's {part} has no such linear"
    got = (layer.in_features, layer.out_features)
    if size != got:
        return f"the linear is [{size[0]}, {size[1]}], the LoRA's [{got[0]}, {got[1]}]: it is for another model"
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
