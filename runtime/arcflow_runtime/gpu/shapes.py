"""Shapes of every part's inputs and outputs (rule B9): batch, image, text and steps -> shapes by name.

Dimensions are known by their place in the table of rule B9, never by the name that the exporter gave them.
"""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_runtime.disk.manifest import Manifest, TensorSpec
from arcflow_runtime.errors import EngineError
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


def conditioner_inputs(manifest: Manifest, batch: int, steps: int) -> Shapes:
    """Input shapes of the conditioner for `steps` timesteps and `batch` prompts."""
    axes = {"timesteps": (steps,), "guidance": (batch,), "pooled_projections": (batch, None)}
    return _inputs(manifest, "conditioner", axes)


def backbone_inputs(manifest: Manifest, size: DenoiseShape) -> Shapes:
    """Input shapes of the backbone."""
    batch, image, text = size.batch, size.image_tokens, size.text_tokens
    axes = {
        "latents": (batch, image, None),
        "encoder_hidden_states": (batch, text, None),
        "modulation": (batch, None),
        "image_rotary": (None, image, None),
        "text_rotary": (None, text, None),
    }
    return _inputs(manifest, "backbone", axes)


def decoder_inputs(manifest: Manifest, size: DenoiseShape) -> Shapes:
    """Input shapes of the VAE decoder."""
    return _inputs(manifest, "vae_decoder", {"latents": (size.batch, *size.grid, None)})


def output_shapes(manifest: Manifest, part: str, inputs: Shapes) -> Shapes:
    """Output shapes of `part` for inputs of these shapes.

    Raises:
        EngineError: the manifest leaves a dimension open that rule B9 fixes.
    """
    first = next(iter(inputs.values()))
    token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor
    axes: dict[str, tuple[int | None, ...]] = {
        "pooled_projections": (first[0], None),
        "encoder_hidden_states": (*first[:2], None),
        "modulation": (*inputs.get("timesteps", ()), inputs.get("pooled_projections", (1,))[0], None),
    }
    if part == "backbone":
        axes = dict.fromkeys(("means", "logweights", "loggammas"), (*inputs["latents"][:2], None, None))
    elif part == "vae_decoder":
        batch, height, width, _ = inputs["latents"]
        axes = {"images": (batch, height * token_px, width * token_px, None)}
    return {spec.name: _fill(part, spec, axes[spec.name]) for spec in manifest.parts[part].outputs}


def _inputs(manifest: Manifest, part: str, axes: dict[str, tuple[int | None, ...]]) -> Shapes:
    return {spec.name: _fill(part, spec, axes[spec.name]) for spec in manifest.parts[part].inputs}


def _fill(part: str, spec: TensorSpec, axes: tuple[int | None, ...]) -> tuple[int, ...]:
    """`axes` with None replaced by what the manifest says."""
    shape = []
    for axis, said in zip(axes, spec.shape, strict=True):
        value = said if axis is None else axis
        if not isinstance(value, int):
            raise EngineError(
                f"{part}: {spec.name} {list(spec.shape)} leaves open a dimension that rule B9 (docs/bundle.md) fixes; "
                "export the bundle again"
            )
        shape.append(value)
    return tuple(shape)
