"""The torch student of benchmarks/gpu against the parts that `arcflow export` traces, with equal weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from arcflow_export.models import flux  # noqa: E402
from arcflow_export.models.layers import MatMul  # noqa: E402
from arcflow_runtime.maths.update import update  # noqa: E402
from tests.gpu.flux_bundle import TINY, flux_bundle, make_job  # noqa: E402

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": TINY.head_dim,
    "axes_dims_rope": list(TINY.axes_dims),
    "guidance_embeds": True,
    "in_channels": TINY.channels,
    "joint_attention_dim": TINY.text_width,
    "num_attention_heads": TINY.heads,
    "num_layers": TINY.double_blocks,
    "num_single_layers": TINY.single_blocks,
    "patch_size": 1,
    "pooled_projection_dim": TINY.pooled_width,
}
#: Name in a diffusers block -> name in the benchmark's.
DOUBLE = {
    **{f"attn.to_{x}": f"image.{x}" for x in "qkv"},
    **{f"attn.add_{x}_proj": f"text.{x}" for x in "qkv"},
    **{f"attn.norm_{x}": f"image.norm_{x}" for x in "qk"},
    **{f"attn.norm_added_{x}": f"text.norm_{x}" for x in "qk"},
    "attn.to_out.0": "image_out",
    "attn.to_add_out": "text_out",
    "ff.net.0.proj": "image_mlp.up",
    "ff.net.2": "image_mlp.down",
    "ff_context.net.0.proj": "text_mlp.up",
    "ff_context.net.2": "text_mlp.down",
}
SINGLE = {
    **{f"attn.to_{x}": f"attention.{x}" for x in "qkv"},
    **{f"attn.norm_{x}": f"attention.norm_{x}" for x in "qk"},
    "proj_mlp": "up",
    "proj_out": "down",
}


@pytest.fixture
def flux_torch(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks" / "gpu"))
    import flux_torch

    yield flux_torch
    sys.modules.pop("flux_torch")


def put(target, source):
    """Copy weights; the exporter's linears store theirs as [in, out]."""
    with torch.no_grad():
        weight = target.weight.T if isinstance(target, MatMul) else target.weight
        weight.copy_(source.weight)
        if getattr(source, "bias", None) is not None:
            target.bias.copy_(source.bias)


@pytest.fixture
def both(flux_torch):
    """The exporter's parts and the benchmark's, by name, in float32 with equal random weights."""
    parts = {p.name: p.module for p in flux.build(CONFIG, TINY.modes, TINY.sub_pixels, "float32", "float32")}
    for module in parts.values():
        module.to_empty(device="cpu")
    for module in parts["conditioner"].modules():
        for name, value in getattr(module, "constants", {}).items():
            setattr(module, name, value)
    ours = flux_torch.random_student(TINY, torch.float32, "cpu")
    for module in ours.values():
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.RMSNorm)):
                layer.weight.add_(torch.randn_like(layer.weight) * 0.1)
            if isinstance(layer, torch.nn.Linear):
                layer.bias.normal_(std=0.1)
    theirs, student = parts["backbone"].transformer, ours["backbone"]
    for names, blocks, mine in (
        (DOUBLE, theirs.transformer_blocks, student.double_blocks),
        (SINGLE, theirs.single_transformer_blocks, student.single_blocks),
    ):
        for block, my_block in zip(blocks, mine, strict=True):
            for name, my_name in names.items():
                put(block.get_submodule(name), my_block.get_submodule(my_name))
    for name in ("x_embedder", "context_embedder"):
        put(theirs.get_submodule(name), student.get_submodule(name))
    for name, mine in (("means", "means"), ("logweights", "logweights"), ("loggamma", "loggammas")):
        put(parts["backbone"].heads.get_submodule(f"proj_out_{name}"), student.get_submodule(mine))
    for name in ("timestep_embedder", "guidance_embedder", "text_embedder"):
        for linear in ("linear_1", "linear_2"):
            put(*(ours_or.get_submodule(f"{name}.{linear}") for ours_or in (parts["conditioner"], ours["conditioner"])))
    whole, start = ours["conditioner"].modulations, 0
    for linear in parts["conditioner"].modulations.linears:
        rows = linear.weight.shape[1]
        with torch.no_grad():
            linear.weight.copy_(whole.weight[start : start + rows].T)
            linear.bias.copy_(whole.bias[start : start + rows])
        start += rows
    assert start == TINY.modulation
    return parts, ours


def test_the_parts_are_those_of_the_exporter(both):
    """In float32 the two differ by the order of summation: in the linears, a few units of 2**-24 per layer."""
    parts, ours = both
    job = make_job(flux_bundle(TINY, "float32"), 64, 16, (1,))
    text = job.texts[0]
    given = {
        "timesteps": torch.tensor(job.timesteps),
        "guidance": torch.tensor([float(job.guidance)]),
        "pooled_projections": torch.tensor(text.pooled),
    }
    expected = parts["conditioner"](*given.values())
    modulation = ours["conditioner"](**given)["modulation"]
    torch.testing.assert_close(modulation, expected, rtol=0, atol=2e-5)
    inputs = {
        "latents": torch.randn(1, 16, 64),
        "encoder_hidden_states": torch.tensor(text.states),
        "modulation": expected[1],
        "image_rotary": torch.tensor(job.image_rotary),
        "text_rotary": torch.tensor(job.text_rotary),
    }
    for found, wanted in zip(ours["backbone"](**inputs).values(), parts["backbone"](*inputs.values()), strict=True):
        assert wanted.std() > 0.1, "the comparison needs results that are not near zero"
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_the_update_is_the_runtimes(flux_torch):
    """Both round each operation to float32: K terms, a softmax and an exponential, some 40 units of 2**-24 of the
    largest term."""
    rng = np.random.default_rng(0)
    heads = {
        "means": rng.standard_normal((2, 9, 16, 64), np.float32),
        "logweights": rng.standard_normal((2, 9, 16, 4), np.float32),
        "loggammas": rng.standard_normal((2, 9, 15, 4), np.float32),
    }
    heads["loggammas"][0, 0] = 0
    latents = rng.standard_normal((2, 9, 64), np.float32)
    expected = update(latents, *heads.values(), 1.0, 1.0, 0.25)
    found = flux_torch.update(torch.tensor(latents), {k: torch.tensor(v) for k, v in heads.items()}, 1.0, 0.25)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=40 * 2**-24 * np.abs(heads["means"]).max())
