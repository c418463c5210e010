"""Rule B9 of docs/bundle.md as a table: family and part -> names, dtypes and axes of inputs and outputs.

The exporter makes a manifest's tensors from it, and optimisation profiles and buffers take their shapes from it. A test
compares it with docs/bundle.md. An axis is a number or a symbol. Symbols in `DYNAMIC` vary from call to call; the
others are sizes of the model, which a manifest has as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_runtime.disk.families import facts
from arcflow_runtime.disk.manifest import DType, Sampler, TensorSpec
from arcflow_runtime.errors import BundleError

Axis = int | str

#: Symbols whose size depends on the request. An exported graph has dynamic dimensions of these names.
DYNAMIC = frozenset(
    {"batch", "steps", "image_tokens", "text_tokens", "latent_height", "latent_width", "height", "width"}
)
#: Stands for the part's own `precision` in place of a dtype.
PRECISION = "D"


@dataclass(frozen=True)
class Tensor:
    """One input or output of a part. An `optional` one may be missing from a manifest, such as guidance."""

    name: str
    dtype: str
    axes: tuple[Axis, ...]
    optional: bool = False


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a part."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor | None:
        """The input called `name`, or None."""
        return next((t for t in self.inputs if t.name == name), None)

    def gives(self, name: str) -> bool:
        """True if an output is called `name`."""
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
#: The backbone of a straight student, in every family (B16).
_STRAIGHT_BACKBONE = Signature(
    _BACKBONE.inputs, (Tensor("velocity", PRECISION, ("batch", "image_tokens", "channels")),)
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
    """All parts of a family with their inputs and outputs.

    Raises:
        BundleError: the family is not in the table.
    """
    facts(family)
    return SIGNATURES[family]


def signature(family: str, part: str, sampler: Sampler = "momentum") -> Signature:
    """The inputs and outputs of one part; only the backbone's outputs depend on the sampler.

    Raises:
        BundleError: the family is not in the table, or has no such part.
    """
    parts = signatures(family)
    if part not in parts:
        raise BundleError(f"a {family} bundle has the parts {', '.join(parts)}, got {part!r}; see B7 in docs/bundle.md")
    return _STRAIGHT_BACKBONE if (part, sampler) == ("backbone", "linear") else parts[part]


def encoder_of(family: str, output: str) -> str | None:
    """The name of the text encoder with the output `output`, or None if the family has none.

    Raises:
        BundleError: the family is not in the table.
    """
    return next((n for n, s in signatures(family).items() if s.input("input_ids") and s.gives(output)), None)


def bakes_modulation(family: str) -> bool:
    """True if the modulation depends only on the schedule, so that a table can replace the conditioner (B7).

    Raises:
        BundleError: the family is not in the table.
    """
    return signature(family, "conditioner").inputs == (_TIMESTEPS,)


def tensor_specs(
    tensors: tuple[Tensor, ...], precision: DType, sizes: Mapping[str, int], without: tuple[str, ...] = ()
) -> tuple[TensorSpec, ...]:
    """Make a manifest's inputs or outputs of one part.

    Args:
        tensors: inputs or outputs of the part's signature.
        precision: the part's precision.
        sizes: symbol -> its size, for every symbol that is not in `DYNAMIC`.
        without: names of optional tensors to leave out.
    """
    found = []
    for tensor in tensors:
        if tensor.optional and tensor.name in without:
            continue
        shape = tuple(a if isinstance(a, int) or a in DYNAMIC else sizes[a] for a in tensor.axes)
        dtype: DType = precision if tensor.dtype == PRECISION else tensor.dtype  # type: ignore[assignment]
        found.append(TensorSpec(tensor.name, dtype, shape))
    return tuple(found)
