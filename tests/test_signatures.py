"""Rule B9: the table that the code reads is the one in docs/bundle.md, and exported bundles have its tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from arcflow_export.graph import trace
from arcflow_runtime import Bundle
from arcflow_runtime.disk.families import FAMILIES, Family
from arcflow_runtime.disk.manifest import DType, TensorSpec
from arcflow_runtime.disk.signatures import (
    DYNAMIC,
    PRECISION,
    SIGNATURES,
    Signature,
    Tensor,
    bakes_modulation,
    encoder_of,
    signature,
    tensor_specs,
)
from arcflow_runtime.errors import BundleError

DOCS = Path(__file__).parent.parent / "docs" / "bundle.md"
#: The documentation's symbols; "D/2" is half the head's size, D alone the dtype.
SYMBOLS = {
    "B": "batch",
    "S": "steps",
    "N": "image_tokens",
    "T": "text_tokens",
    "C": "channels",
    "P": "sub_pixels",
    "K": "modes",
    "K-1": "gammas",
    "M": "modulation",
    "Dp": "pooled_width",
    "Dt": "text_width",
    "D/2": "half_head",
    "H": "height",
    "W": "width",
    "H/16": "latent_height",
    "W/16": "latent_width",
    "77": "clip_tokens",
}
NAMES = {"FLUX": "flux", "Qwen-Image": "qwen-image"}


def documented() -> dict[str, dict[str, Signature]]:
    """The table below B9, by family and part; a row without a family is for each that has the part."""
    text = DOCS.read_text(encoding="utf-8").split("**B9.**")[1].split("**B10.**")[0]
    found: dict[str, dict[str, Signature]] = {family: {} for family in SIGNATURES}
    for line in text.splitlines():
        row = re.fullmatch(r"\| `(\w+)`(?: \(([\w-]+)\))? \| (.*) \| (.*) \|", line)
        if row is None:
            continue
        part, only, inputs, outputs = row.groups()
        families = [NAMES[only]] if only else [f for f in SIGNATURES if part in SIGNATURES[f]]
        for family in families:
            found[family][part] = Signature(_tensors(inputs), _tensors(outputs))
    return found


def _tensors(cell: str) -> tuple[Tensor, ...]:
    pattern = r"`(\w+)` \[([^\]]+)\] (\w+)( if `\w+`)?"
    return tuple(
        Tensor(name, dtype, tuple(_axis(a) for a in axes.split(", ")), bool(optional))
        for name, axes, dtype, optional in re.findall(pattern, cell)
    )


def _axis(text: str) -> int | str:
    return SYMBOLS[text] if text in SYMBOLS else int(text)


def test_the_documentation_has_the_same_table():
    found = documented()
    assert {family: set(parts) for family, parts in found.items()} == {f: set(p) for f, p in SIGNATURES.items()}
    for family, parts in SIGNATURES.items():
        for part, expected in parts.items():
            assert found[family][part] == expected, f"{family}: {part}"


def test_tables_have_the_same_families():
    assert SIGNATURES.keys() == FAMILIES.keys() == set(get_args(Family))


def test_dtypes_are_the_manifests():
    tensors = [t for parts in SIGNATURES.values() for s in parts.values() for t in (*s.inputs, *s.outputs)]
    assert {t.dtype for t in tensors} - {PRECISION} <= set(get_args(DType))


def test_every_dynamic_input_axis_has_a_size_to_trace_with():
    inputs = {a for parts in SIGNATURES.values() for s in parts.values() for t in s.inputs for a in t.axes}
    assert inputs & DYNAMIC == trace._EXAMPLE.keys() == trace._LARGEST.keys()


@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_exported_bundles_have_these_tensors(bundles, name):
    m = Bundle.open(bundles(name)).manifest
    for part, made in m.parts.items():
        expected = signature(m.family, part)
        for specs, tensors in ((made.inputs, expected.inputs), (made.outputs, expected.outputs)):
            assert [s.name for s in specs] == [t.name for t in tensors]
            for spec, tensor in zip(specs, tensors, strict=True):
                assert spec.dtype == (made.precision if tensor.dtype == PRECISION else tensor.dtype)
                for dim, axis in zip(spec.shape, tensor.axes, strict=True):
                    assert dim == axis if isinstance(axis, int) or axis in DYNAMIC else isinstance(dim, int)


def test_specs_of_a_part():
    conditioner = signature("flux", "conditioner")
    sizes = {"pooled_width": 768, "modulation": 11}
    assert tensor_specs(conditioner.inputs, "bfloat16", sizes) == (
        TensorSpec("timesteps", "float32", ("steps",)),
        TensorSpec("guidance", "float32", ("batch",)),
        TensorSpec("pooled_projections", "bfloat16", ("batch", 768)),
    )
    without = tensor_specs(conditioner.inputs, "bfloat16", sizes, ("guidance",))
    assert [t.name for t in without] == ["timesteps", "pooled_projections"]
    assert tensor_specs(conditioner.outputs, "float16", sizes) == (
        TensorSpec("modulation", "float16", ("steps", "batch", 11)),
    )


def test_what_follows_from_the_table():
    assert encoder_of("flux", "encoder_hidden_states") == "text_encoder_2"
    assert encoder_of("flux", "pooled_projections") == "text_encoder"
    assert encoder_of("qwen-image", "encoder_hidden_states") == "text_encoder"
    assert encoder_of("qwen-image", "pooled_projections") is None
    assert (bakes_modulation("flux"), bakes_modulation("qwen-image")) == (False, True)


def test_an_unknown_part():
    with pytest.raises(BundleError, match=r"^a qwen-image bundle has the parts .*, got 'text_encoder_2'; see B7"):
        signature("qwen-image", "text_encoder_2")
