"""The names that tools give to the linears of FLUX, CLIP and T5."""

from __future__ import annotations

from collections.abc import Iterator

from arcflow_runtime.lora.target import ADDED_QKV, QKV, Entry, Target, attention, same

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
#: diffusers' name of an embedding -> its authors'.
_EMBEDDINGS = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}


def entries() -> Iterator[Entry]:
    """Every spelling of every linear."""
    yield from _diffusers()
    yield from _authors()
    yield from _clip()
    layer = "encoder.block.{i}.layer"
    yield from same("text_encoder_2", (f"{layer}.0.SelfAttention.{n}" for n in "qkvo"))
    yield from same("text_encoder_2", (f"{layer}.1.DenseReluDense.{n}" for n in ("wi_0", "wi_1", "wo")))


def _diffusers() -> Iterator[Entry]:
    yield from attention(_DOUBLE)
    yield from same("transformer", (f"{_DOUBLE}.{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")))
    yield from same("transformer", (f"{_DOUBLE}.norm1.linear", f"{_DOUBLE}.norm1_context.linear"))
    yield from same("transformer", (f"{_SINGLE}.attn.{n}" for n in QKV))
    yield from same("transformer", (f"{_SINGLE}.{n}" for n in ("proj_mlp", "proj_out", "norm.linear")))
    yield f"{_SINGLE}.attn.to_qkv", Target("transformer", tuple(f"{_SINGLE}.attn.{n}" for n in QKV), "equal")
    yield from same("transformer", ("x_embedder", "context_embedder", "norm_out.linear", "proj_out"))
    yield from same("transformer", (f"time_text_embed.{e}.linear_{n}" for e in _EMBEDDINGS for n in "12"))


def _authors() -> Iterator[Entry]:
    """Names of FLUX's authors, which Kohya's scripts and ComfyUI use too, and XLabs' (with `processor`)."""
    streams = (
        ("img", "1", "to_out.0", QKV, "ff", "norm1"),
        ("txt", "2", "to_add_out", ADDED_QKV, "ff_context", "norm1_context"),
    )
    for stream, number, out, inputs, ff, norm in streams:
        block = "double_blocks.{i}"
        fused = Target("transformer", tuple(f"{_DOUBLE}.attn.{n}" for n in inputs), "equal")
        proj = Target("transformer", (f"{_DOUBLE}.attn.{out}",))
        yield f"{block}.{stream}_attn.qkv", fused
        yield f"{block}.processor.qkv_lora{number}", fused
        yield f"{block}.{stream}_attn.proj", proj
        yield f"{block}.processor.proj_lora{number}", proj
        yield f"{block}.{stream}_mlp.0", Target("transformer", (f"{_DOUBLE}.{ff}.net.0.proj",))
        yield f"{block}.{stream}_mlp.2", Target("transformer", (f"{_DOUBLE}.{ff}.net.2",))
        yield f"{block}.{stream}_mod.lin", Target("transformer", (f"{_DOUBLE}.{norm}.linear",))
    qkv = tuple(f"{_SINGLE}.attn.{n}" for n in QKV)
    yield "single_blocks.{i}.linear1", Target("transformer", (*qkv, f"{_SINGLE}.proj_mlp"), "qkv-mlp")
    yield "single_blocks.{i}.processor.qkv", Target("transformer", qkv, "equal")
    yield "single_blocks.{i}.linear2", Target("transformer", (f"{_SINGLE}.proj_out",))
    yield "single_blocks.{i}.processor.proj", Target("transformer", (f"{_SINGLE}.proj_out",))
    yield "single_blocks.{i}.modulation.lin", Target("transformer", (f"{_SINGLE}.norm.linear",))
    for ours, theirs in _EMBEDDINGS.items():
        yield f"{theirs}.in_layer", Target("transformer", (f"time_text_embed.{ours}.linear_1",))
        yield f"{theirs}.out_layer", Target("transformer", (f"time_text_embed.{ours}.linear_2",))
    yield "img_in", Target("transformer", ("x_embedder",))
    yield "txt_in", Target("transformer", ("context_embedder",))
    yield "final_layer.linear", Target("transformer", ("proj_out",))
    # The authors' layer gives (shift, scale), diffusers' (scale, shift).
    yield "final_layer.adaLN_modulation.1", Target("transformer", ("norm_out.linear",), swapped=True)


def _clip() -> Iterator[Entry]:
    """transformers' names with and without `text_model`, and those of old versions of diffusers."""
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    spelt: dict[str, tuple[str, ...]] = {"mlp.fc1": ("mlp.fc1",), "mlp.fc2": ("mlp.fc2",)}
    spelt |= {f"self_attn.{n}": (f"self_attn.{n}", f"self_attn.{o}") for n, o in old.items()}
    for name, spellings in spelt.items():
        target = Target("text_encoder", (f"text_model.encoder.layers.{{i}}.{name}",))
        for spelling in spellings:
            yield f"text_model.encoder.layers.{{i}}.{spelling}", target
            yield f"encoder.layers.{{i}}.{spelling}", target
