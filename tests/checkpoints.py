"""Write small but complete checkpoints and adapters of random numbers, in the formats of diffusers and ArcFlow."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, FluxTransformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from arcflow_export.checkpoint.sources import Location
from arcflow_export.student.load import Student, load_student

GOLDEN = Path(__file__).parent / "golden"
ADAPTER_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Sizes:
    """Sizes and options of a checkpoint and its adapter.

    `text_dim` is the width of T5's or Qwen's states, `pooled_dim` that of CLIP's pooled vector, `modes` is K, `rank`
    that of the LoRA, and `prefix` comes before each of the adapter's keys.
    """

    family: str = "flux"
    layers: int = 1
    single_layers: int = 1
    heads: int = 2
    axes: tuple[int, int, int] = (4, 6, 6)
    text_dim: int = 32
    pooled_dim: int = 16
    modes: int = 3
    guidance: bool = True
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "10GB"
    prefix: str = ""
    rank: int = 4
    vae_blocks: tuple[int, ...] = (4, 4, 8, 8)
    vae_layers: int = 1
    post_quant_conv: bool = False

    @property
    def flux(self) -> bool:
        return self.family == "flux"

    @property
    def dim(self) -> int:
        return self.heads * sum(self.axes)


#: Sizes of the golden checkpoints and adapters.
GOLDEN_SIZES = {
    "flux": Sizes(layers=2, single_layers=3, axes=(8, 12, 12), text_dim=64, pooled_dim=32, modes=16),
    "qwen": Sizes("qwen", layers=3, axes=(8, 12, 12), text_dim=64, modes=16),
}


def make_student(root: Path, sizes: Sizes, seed: int = 0) -> Student:
    """Write a base to `root/base` and an adapter to `root/adapter`, and open the student."""
    make_base(root / "base", sizes, seed)
    make_adapter(root / "adapter", sizes, seed)
    return open_student(root)


def open_student(root: Path, loras: list | None = None) -> Student:
    return load_student(Location(str(root / "base")), Location(str(root / "adapter")), loras or [])


def make_base(root: Path, sizes: Sizes, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    golden = GOLDEN / f"{sizes.family}-tiny" / "base"
    root.mkdir(parents=True)
    shutil.copy(golden / "model_index.json", root)
    for folder in golden.glob("tokenizer*"):
        shutil.copytree(folder, root / folder.name)
    shutil.copytree(golden / "scheduler", root / "scheduler")
    models = {"transformer": _transformer(sizes), "vae": _vae(sizes)} | _text_encoders(sizes)
    for name, model in models.items():
        _randomise(model)
        model.to(sizes.dtype).save_pretrained(root / name, max_shard_size=sizes.max_shard_size)
    return root


def make_adapter(root: Path, sizes: Sizes, seed: int = 0) -> Path:
    """Write an adapter. Its LoRA changes the weights by about their own size, so that tests notice a missing merge."""
    generator = torch.Generator().manual_seed(seed + 1)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    tensors = {}
    for module, (out, inp) in lora_targets(sizes).items():
        tensors[f"{module}.lora_A.weight"] = random(sizes.rank, inp, scale=inp**-0.5)
        tensors[f"{module}.lora_B.weight"] = random(out, sizes.rank, scale=sizes.rank**-0.5)
    dim, k = sizes.dim, sizes.modes
    rows = {"proj_out_means": k * 64, "proj_out_logweights": k * 4, "proj_out_loggamma": (k - 1) * 4}
    for head, out in rows.items():
        tensors[f"{head}.weight"], tensors[f"{head}.bias"] = random(out, dim, scale=dim**-0.5), random(out, scale=0.1)
    tensors["norm_out.linear.weight"] = random(2 * dim, dim, scale=0.5 * dim**-0.5)
    tensors["norm_out.linear.bias"] = random(2 * dim, scale=0.1)
    root.mkdir(parents=True)
    write_adapter(root, {f"{sizes.prefix}{key}": value.to(sizes.dtype) for key, value in tensors.items()})
    (root / "config.json").write_text(json.dumps(adapter_config(sizes)))
    return root


def write_adapter(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, root / ADAPTER_FILE, metadata={"policy_config": '{"type": "ArcFlow"}'})


def adapter_config(sizes: Sizes) -> dict:
    config = _transformer_config(sizes) | {"num_gaussians": sizes.modes, "logweights_channels": 4}
    config.pop("patch_size")
    name = "ArcFluxTransformer2DModel" if sizes.flux else "ArcQwenImageTransformer2DModel"
    return config | {"_class_name": name, "out_channels": None if sizes.flux else 64}


def lora_targets(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """The modules that the released adapters have LoRA factors for: module -> (out, in)."""
    dim, wide = sizes.dim, 4 * sizes.dim
    targets = {
        "time_text_embed.timestep_embedder.linear_1": (dim, 256),
        "time_text_embed.timestep_embedder.linear_2": (dim, dim),
    }
    streams = ("ff", "ff_context") if sizes.flux else ("img_mlp", "txt_mlp")
    for i in range(sizes.layers):
        for stream in streams:
            if stream == "txt_mlp" and i == sizes.layers - 1:
                continue
            targets[f"transformer_blocks.{i}.{stream}.net.0.proj"] = (wide, dim)
            targets[f"transformer_blocks.{i}.{stream}.net.2"] = (dim, wide)
    for i in range(sizes.single_layers if sizes.flux else 0):
        targets[f"single_transformer_blocks.{i}.proj_mlp"] = (wide, dim)
        targets[f"single_transformer_blocks.{i}.proj_out"] = (dim, dim + wide)
    return targets


def _transformer_config(sizes: Sizes) -> dict:
    config = {
        "in_channels": 64,
        "num_layers": sizes.layers,
        "attention_head_dim": sum(sizes.axes),
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": sizes.text_dim,
        "axes_dims_rope": list(sizes.axes),
        "patch_size": 1 if sizes.flux else 2,
    }
    if sizes.flux:
        config |= {"num_single_layers": sizes.single_layers, "pooled_projection_dim": sizes.pooled_dim}
        config["guidance_embeds"] = sizes.guidance
    return config


def _transformer(sizes: Sizes) -> torch.nn.Module:
    config = _transformer_config(sizes)
    if sizes.flux:
        return FluxTransformer2DModel(**config)
    return QwenImageTransformer2DModel(**config, out_channels=16)


def _vae(sizes: Sizes) -> torch.nn.Module:
    if not sizes.flux:
        base, *_ = sizes.vae_blocks
        multiples = [b // base for b in sizes.vae_blocks]
        return AutoencoderKLQwenImage(
            base_dim=base, z_dim=16, dim_mult=multiples, num_res_blocks=sizes.vae_layers, attn_scales=[]
        )
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=list(sizes.vae_blocks),
        layers_per_block=sizes.vae_layers,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=sizes.post_quant_conv,
        use_post_quant_conv=sizes.post_quant_conv,
    )


def _text_encoders(sizes: Sizes) -> dict[str, torch.nn.Module]:
    if not sizes.flux:
        text = {
            "hidden_size": sizes.text_dim,
            "intermediate_size": 2 * sizes.text_dim,
            "num_attention_heads": sizes.text_dim // 16,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "max_position_embeddings": 2048,
            "vocab_size": 279,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 2, 2]},
            "rope_theta": 1e6,
        }
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config)}
    clip = CLIPTextConfig(
        vocab_size=531,
        hidden_size=sizes.pooled_dim,
        intermediate_size=2 * sizes.pooled_dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=529,
        eos_token_id=530,
    )
    t5 = T5Config(
        vocab_size=90,
        d_model=sizes.text_dim,
        d_kv=8,
        d_ff=2 * sizes.text_dim,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}


def _randomise(model: torch.nn.Module) -> None:
    """Change biases and norms from their initial zeros and ones, with which a missing one would go unnoticed."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p += 0.1 * torch.randn_like(p)


def make_style(path: Path, targets: dict[str, tuple[int, int]], rank: int = 2, alpha: float | None = None) -> Path:
    """Write a style LoRA in diffusers' naming.

    Args:
        path: the safetensors file to write.
        targets: `component.module` -> (out, in).
        rank: rank of the factors.
        alpha: LoRA alpha, written into the metadata if given.
    """
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for module, (out, inp) in targets.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inp, generator=generator) * inp**-0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * rank**-0.5
    components = {module.split(".")[0] for module in targets}
    adapter = {f"{c}.{key}": value for c in components for key, value in (("r", rank), ("lora_alpha", alpha))}
    metadata = {} if alpha is None else {"lora_adapter_metadata": json.dumps(adapter)}
    save_file(tensors, path, metadata={"format": "pt"} | metadata)
    return path
