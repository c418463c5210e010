"""Read LoRA files of any common tool: a safetensors file -> factors in float32 by part and linear.

from arcflow_runtime.lora.read import read_lora

lora = read_lora(Path("ink.safetensors"), "flux")  # or "qwen-image"
for (part, name), layer in lora.layers.items():
    part         # "backbone", "conditioner", "text_encoder" or "text_encoder_2", as in the bundle
    name         # "transformer_blocks.0.attn.to_q": the weight's name in the checkpoint without ".weight"
    layer.down   # A [r, in] float32, read-only
    layer.up     # B [out, r] float32, read-only
    layer.scale  # W' = W + layer.scale * layer.up @ layer.down
    layer.source # where the scale comes from, for messages

Fused linears of the file (qkv, linear1) are already split. Text encoders have other names in some checkpoints:
`names.spellings(family, part, name)` lists them. Shapes are not compared with a model here: the caller knows the model.
Every tensor of the file is in a layer, in `lora.skipped` with the reason, or named in a `LoraError`.
"""
