"""Rule B9 as a table: family and part -> names, dtypes and axes of inputs and outputs.

The exporter makes a bundle's tensors from it, profiles and buffers take their sizes from it, and a test compares it
with docs/bundle.md. An axis is a number or a symbol. The symbols of `DYNAMIC` differ from call to call; the others are
sizes of the model, which the manifest gives as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_runtime.disk.families import facts
from arcflow_runtime.disk.manifest import DType, TensorSpec
from arcflow_runtime.errors import BundleError

Axis = int | str

#: Symbols whose size is the request's. An exported graph has a dynamic dimension of that name.
DYNAMIC = frozenset(
    {"batch", "steps", "image_tokens", "text_tokens", "latent_height", "latent_width", "height", "width"}
)
#: In place of a dtype: that of the part's arithmetic, its `precision`.
PRECISION = "D"


@dataclass(frozen=True)
class Tensor:
    """One input or output. `optional`: it is there only if the manifest says so, as guidance is."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """What goes into a part and comes out."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor | None:
        """The input of that name, None if there is none."""
        return next((t for t in self.inputs if t.name == name), None)

    def gives(self, name: str) -> bool:
        """True if an output has that name."""
        return any(t.name == name for t in self.outputs)


_STATES = Tensor("encoder_hidden_states", PRECISION, ("batch", "text_tokens", "text_width"))
_POOLED = Tensor("pooled_projections", PRECISION, ("batch", "pooled_width"))
_TIMESTEPS = Tensor("timesteps", "float32", ("steps",))
_GUIDANCE = Tensor("guidance", "float32", ("batch",), optional=True)
_TEXT_ENCODER = Signature((Tensor("input_ids", "int64", ("batch", "text_tokens")),), (_STATES,))
_BACKBONE = Signature(
    (
        Tensor("latents", PRECISION, ("batch", "image_tokens", "channels")),
        _STATES,
        Tensor("modulation", PRECISION, ("batch", "modulation")),
        Tensor("image_rotary", "float32", (2, "image_tokens", "half_head")),
        Tensor("text_rotary", "float32", (2, "text_tokens", "half_head")),
    ),
    (
        Tensor("means", PRECISION, ("batch", "image_tokens", "modes", "channels")),
        Tensor("logweights", PRECISION, ("batch", "image_tokens", "modes", "sub_pixels")),
        Tensor("loggammas", PRECISION, ("batch", "image_tokens", "gammas", "sub_pixels")),
    ),
)
_VAE_DECODER = Signature(
    (Tensor("latents", "float32", ("batch", "latent_height", "latent_width", "channels")),),
    (Tensor("images", "uint8", ("batch", "height", "width", 3)),),
)

#: Family -> its parts, in the order in which data flows.
SIGNATURES: dict[str, dict[str, Signature]] = {
    "flux": {
        "text_encoder": Signature((Tensor("input_ids", "int64", ("batch", "clip_tokens")),), (_POOLED,)),
        "text_encoder_2": _TEXT_ENCODER,
        "conditioner": Signature(
            (_TIMESTEPS, _GUIDANCE, _POOLED),
            (Tensor("modulation", PRECISION, ("steps", "batch", "modulation")),),
        ),
        "backbone": _BACKBONE,
        "vae_decoder": _VAE_DECODER,
    },
    "qwen-image": {
        "text_encoder": _TEXT_ENCODER,
        "conditioner": Signature((_TIMESTEPS,), (Tensor("modulation", PRECISION, ("steps", 1, "modulation")),)),
        "backbone": _BACKBONE,
        "vae_decoder": _VAE_DECODER,
    },
}


def signatures(family: str) -> dict[str, Signature]:
    """The parts of a family.

    Raises:
        BundleError: the family is not in the table.
    """
    facts(family)
    return SIGNATURES[family]


def signature(family: str, part: str) -> Signature:
    """What goes into one part and comes out.

    Raises:
        BundleError: the family is not in the table, or has no such part.
    """
    parts = signatures(family)
    if part not in parts:
        raise BundleError(f"a {family} bundle has the parts {', '.join(parts)}, got {part!r}; see B7 in docs/bundle.md")
    return parts[part]


def encoder_of(family: str, output: str) -> str | None:
    """The text encoder that gives `output`; None if the family has none that does.

    Raises:
        BundleError: the family is not in the table.
    """
    return next((n for n, s in signatures(family).items() if s.input("input_ids") and s.gives(output)), None)


def bakes_modulation(family: str) -> bool:
    """True if the modulation depends on the schedule alone, so that a table may stand for the conditioner (B7).

    Raises:
        BundleError: the family is not in the table.
    """
    return signature(family, "conditioner").inputs == (_TIMESTEPS,)


def tensor_specs(
    tensors: tuple[Tensor, ...], precision: DType, sizes: Mapping[str, int], without: tuple[str, ...] = ()
) -> tuple[TensorSpec, ...]:
    """A manifest's inputs or outputs of one part.

    Args:
        tensors: of its signature.
        precision: of the part.
        sizes: of every symbol that is a size of the model.
        without: optional tensors to leave out.
    """
    found = []
    for tensor in tensors:
        if tensor.optional and tensor.name in without:
            continue
        shape = tuple(a if isinstance(a, int) or a in DYNAMIC else sizes[a] for a in tensor.axes)
        dtype: DType = precision if tensor.dtype == PRECISION else tensor.dtype  # type: ignore[assignment]
        found.append(TensorSpec(tensor.name, dtype, shape))
    return tuple(found)
