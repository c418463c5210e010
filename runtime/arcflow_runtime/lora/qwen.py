"""The names that tools give to the linears of Qwen-Image and of its text encoder; all tools use diffusers'."""

from __future__ import annotations

from collections.abc import Iterator

from arcflow_runtime.lora.target import Entry, Target, attention, same

#: What may come before `layers` in a checkpoint of Qwen2.5-VL, the released checkpoint's first.
LANGUAGE = ("model.", "model.language_model.", "language_model.model.")


def entries() -> Iterator[Entry]:
    """Every spelling of every linear."""
    block = "transformer_blocks.{i}"
    yield from attention(block)
    kinds = ("mlp.net.0.proj", "mlp.net.2", "mod.1")
    yield from same("transformer", (f"{block}.{stream}_{kind}" for stream in ("img", "txt") for kind in kinds))
    yield from same("transformer", (f"time_text_embed.timestep_embedder.linear_{n}" for n in "12"))
    yield from same("transformer", ("img_in", "txt_in", "norm_out.linear", "proj_out"))
    attentions = tuple(f"self_attn.{n}_proj" for n in "qkvo")
    for name in (*attentions, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        target = Target("text_encoder", (f"{LANGUAGE[0]}layers.{{i}}.{name}",))
        for prefix in ("", "language_model.", *LANGUAGE):
            yield f"{prefix}layers.{{i}}.{name}", target
