"""Choose the linears that get LoRA slots, from name patterns: parts and patterns -> layer names by part.

`arcflow export --lora-slots` uses this.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from arcflow_export.models.layers import MatMul, ModelPart
from arcflow_export.student.keep import linears
from arcflow_runtime.disk.manifest import DType, SlotLayer
from arcflow_runtime.disk.signatures import encoder_of
from arcflow_runtime.errors import RequestError

#: The student's heads. They replace the base's last linear, so no LoRA of the base is for them.
_HEADS = "proj_out_"


def slot_layers(family: str, parts: list[ModelPart], patterns: Iterable[str]) -> dict[str, dict[str, SlotLayer]]:
    """The linears that match a pattern, by part: in the backbone without its heads, the conditioner and CLIP.

    Args:
        family: the student's family.
        parts: all parts of the student, in their final dtypes.
        patterns: fnmatch patterns for layer names.

    Raises:
        RequestError: a pattern matches no such linear; the message suggests one.
    """
    with_slots = ("backbone", "conditioner", encoder_of(family, "pooled_projections"))
    known = {
        part.name: {name: _layer(module) for name, module in linears(part).items() if not name.startswith(_HEADS)}
        for part in parts
        if part.name in with_slots
    }
    chosen: dict[str, dict[str, SlotLayer]] = {}
    for pattern in patterns:
        hits = {part: [n for n in layers if fnmatchcase(n, pattern)] for part, layers in known.items()}
        if not any(hits.values()):
            close = difflib.get_close_matches(pattern, [name for layers in known.values() for name in layers], 1)
            hint = f"; did you mean {close[0]}?" if close else "; names are the weights' keys without '.weight'"
            raise RequestError(f"--lora-slots: {pattern!r} matches no linear of {', '.join(known)}{hint}")
        for part, names in hits.items():
            chosen.setdefault(part, {}).update({name: known[part][name] for name in names})
    # In the order of the graph, whatever the order of the patterns.
    return {p: {n: size for n, size in known[p].items() if n in names} for p, names in chosen.items() if names}


def _layer(module: MatMul) -> SlotLayer:
    rows, columns = module.weight.shape
    dtype: DType = str(module.weight.dtype).removeprefix("torch.")  # type: ignore[assignment]
    return SlotLayer(rows, columns, dtype)
