"""Count how much of each part is quantised: linears, parameters and FLOPs. `arcflow quantize` prints the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_export.formats.policy import Storage
from arcflow_export.graph.linears import LinearNode
from arcflow_runtime.disk.families import facts
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.signatures import signature


@dataclass(frozen=True)
class Coverage:
    """One part: its linears, parameters and FLOPs per call, and how many of each are quantised.

    FLOPs count the linears only, two per multiplication, for one image. `parameters` counts the whole part. `left` are
    the names of the linears that are not quantised. `stored` are the other weights that take fewer bits in the file, by
    name.
    """

    part: str
    linears: int
    quantized_linears: int
    parameters: int
    quantized_parameters: int
    flops: int
    quantized_flops: int
    left: tuple[str, ...]
    stored: Mapping[str, Storage]


def cover_part(
    manifest: Manifest,
    part: str,
    linears: Mapping[str, LinearNode],
    chosen: tuple[str, ...],
    stored: Mapping[str, Storage],
    height_px: int,
    width_px: int,
) -> Coverage:
    """Count one part.

    Args:
        manifest: the bundle's manifest, for the part's inputs, its parameters and the text length.
        part: name of the part.
        linears: all linears of the part, by name.
        chosen: names of the linears to quantise.
        stored: other weights that take fewer bits, by name.
        height_px: image height, within the manifest's range.
        width_px: image width, within the manifest's range.
    """
    dimensions = _dimensions(manifest, part, height_px, width_px)
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
        dict(stored),
    )


def _dimensions(manifest: Manifest, part: str, height_px: int, width_px: int) -> dict[str, int]:
    """The sizes of the part's symbolic dimensions, for one image and a prompt of usual length.

    A dimension is identified by its position in the table of rule B9, not by its name.
    """
    inputs = signature(manifest.family, part)
    token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor
    height, width = height_px // token_px, width_px // token_px
    text = facts(manifest.family).usual_text_tokens(manifest.text.max_sequence_length)
    if inputs.input("input_ids") is not None:
        text += manifest.text.drop_tokens
    sizes: dict[str, int] = {
        "batch": 1,
        "steps": manifest.schedule.num_inference_steps,
        "text_tokens": text,
        "image_tokens": height * width,
        "latent_height": height,
        "latent_width": width,
    }
    return {
        name: sizes[str(axis)]
        for spec in manifest.parts[part].inputs
        if (tensor := inputs.input(spec.name)) is not None
        for name, axis in zip(spec.shape, tensor.axes, strict=True)
        if isinstance(name, str)
    }


def _flops(linear: LinearNode, dimensions: Mapping[str, int]) -> int:
    assert linear.input.shape is not None
    rows = 1
    for dim in list(linear.input.shape)[:-1]:
        size = dim if isinstance(dim, int) else dim.evaluate(dimensions)
        assert isinstance(size, int), (linear.name, dim)
        rows *= size
    return 2 * rows * linear.parameters
