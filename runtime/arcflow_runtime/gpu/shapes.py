"""Shapes of every part's inputs and outputs (rule B9): batch, image, text and steps -> shapes by name.

A dimension is identified by its position in the table of rule B9, never by the name that the exporter gave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcflow_runtime.disk.manifest import Manifest, TensorSpec
from arcflow_runtime.disk.signatures import Tensor, signature
from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    from arcflow_runtime.gpu.engine import Shapes


@dataclass(frozen=True)
class DenoiseShape:
    """The sizes of a job: B images of `grid` (height, width) tokens with T text tokens each, generated in S steps."""

    batch: int
    grid: tuple[int, int]
    text_tokens: int
    steps: int

    @property
    def image_tokens(self) -> int:
        """N, tokens of one image."""
        return self.grid[0] * self.grid[1]


def encoder_inputs(manifest: Manifest, part: str, text_tokens: int) -> Shapes:
    """Input shapes of a text encoder for one prompt with `text_tokens` states; it also sees the template's tokens."""
    tokens = manifest.text.drop_tokens + text_tokens
    sizes = {"batch": 1, "text_tokens": tokens}
    if manifest.text.clip_tokens is not None:
        sizes["clip_tokens"] = manifest.text.clip_tokens
    return _inputs(manifest, part, sizes)


def conditioner_inputs(manifest: Manifest, batch: int, steps: int) -> Shapes:
    """Input shapes of the conditioner for `steps` timesteps and `batch` prompts."""
    return _inputs(manifest, "conditioner", {"steps": steps, "batch": batch})


def backbone_inputs(manifest: Manifest, size: DenoiseShape) -> Shapes:
    """Input shapes of the backbone."""
    sizes = {"batch": size.batch, "image_tokens": size.image_tokens, "text_tokens": size.text_tokens}
    return _inputs(manifest, "backbone", sizes)


def decoder_inputs(manifest: Manifest, size: DenoiseShape) -> Shapes:
    """Input shapes of the VAE decoder."""
    height, width = size.grid
    sizes = {"batch": size.batch, "latent_height": height, "latent_width": width}
    return _inputs(manifest, "vae_decoder", sizes)


def output_shapes(manifest: Manifest, part: str, inputs: Shapes) -> Shapes:
    """Output shapes of `part` for inputs of these shapes.

    Raises:
        EngineError: the manifest leaves a dimension open that rule B9 fixes.
    """
    tensors = signature(manifest.family, part, manifest.sampler)
    sizes: dict[str, int] = {}
    for tensor in tensors.inputs:
        if tensor.name in inputs:
            sizes |= {a: n for a, n in zip(tensor.axes, inputs[tensor.name], strict=True) if isinstance(a, str)}
    token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor
    for side in ("height", "width"):
        if (latent := sizes.get(f"latent_{side}")) is not None:
            sizes[side] = latent * token_px
    return {spec.name: _fill(part, spec, tensors.outputs, sizes) for spec in manifest.parts[part].outputs}


def _inputs(manifest: Manifest, part: str, sizes: Mapping[str, int]) -> Shapes:
    tensors = signature(manifest.family, part).inputs
    return {spec.name: _fill(part, spec, tensors, sizes) for spec in manifest.parts[part].inputs}


def _fill(part: str, spec: TensorSpec, tensors: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor: sizes of the call where rule B9 has their symbol, otherwise what the manifest says."""
    axes = next((t.axes for t in tensors if t.name == spec.name), ())
    if len(axes) != len(spec.shape):
        raise EngineError(
            f"{part}: {spec.name} must have the axes of rule B9 (docs/bundle.md), got {list(spec.shape)}; "
            "export the bundle again"
        )
    shape = []
    for axis, said in zip(axes, spec.shape, strict=True):
        value = axis if isinstance(axis, int) else sizes.get(axis, said)
        if not isinstance(value, int):
            raise EngineError(
                f"{part}: {spec.name} must have fixed sizes where rule B9 (docs/bundle.md) has them, "
                f"got {list(spec.shape)}; export the bundle again"
            )
        shape.append(value)
    return tuple(shape)
