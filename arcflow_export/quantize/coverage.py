"""What a quantisation covers: the linears of each part -> shares of linears, parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_export.quantize.graph import Linear
from arcflow_runtime.build.profiles import Size, make_profiles
from arcflow_runtime.disk.manifest import Manifest, Range


@dataclass(frozen=True)
class Coverage:
    """One part: how many linears, parameters and FLOPs of one call there are, and how many of them are quantised.

    FLOPs are those of linears alone, two per multiplication, for one image; `parameters` are all of the part.
    """

    part: str
    linears: int
    quantized_linears: int
    parameters: int
    quantized_parameters: int
    flops: int
    quantized_flops: int
    left: tuple[str, ...]


def cover_part(
    manifest: Manifest, part: str, linears: Mapping[str, Linear], chosen: tuple[str, ...], height_px: int, width_px: int
) -> Coverage:
    """Count one part.

    Args:
        manifest: gives the part's inputs, the length of texts and the part's parameters.
        part: its name.
        linears: all of its linears.
        chosen: names of those to quantise.
        height_px: an image's height, within the manifest's range.
        width_px: its width.
    """
    size = Size(Range(height_px, height_px), Range(width_px, width_px))
    (profile,) = make_profiles(manifest, part, (size,), Range(1, 1))
    dimensions = {
        name: value
        for spec in manifest.parts[part].inputs
        for name, value in zip(spec.shape, profile[spec.name].opt, strict=True)
        if isinstance(name, str)
    }
    flops = {name: _flops(linear, dimensions) for name, linear in linears.items()}
    return Coverage(
        part,
        len(linears),
        len(chosen),
        manifest.parts[part].parameters,
        sum(linears[name].parameters for name in chosen),
        sum(flops.values()),
        sum(flops[name] for name in chosen),
        tuple(name for name in linears if name not in set(chosen)),
    )


def _flops(linear: Linear, dimensions: Mapping[str, int]) -> int:
    assert linear.input.shape is not None
    rows = 1
    for dim in list(linear.input.shape)[:-1]:
        size = dim if isinstance(dim, int) else dim.evaluate(dimensions)
        assert isinstance(size, int), (linear.name, dim)
        rows *= size
    return 2 * rows * linear.parameters
