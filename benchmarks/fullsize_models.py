"""The released models as on the hub: configs, tensor names and shapes of every component; for `fullsize.py`.

Names and shapes come from diffusers' and transformers' own classes on the meta device, and are renamed as in the hub's
files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]

#: The adapter's settings: LoRA rank, modes, and sub-pixels of a packed token, each with its own mode weights.
RANK, NUM_GAUSSIANS, LOGWEIGHTS_CHANNELS = 256, 16, 4
#: diffusers and transformers split a component's files at these sizes.
_SHARD_10GB, _SHARD_5GB = 10_000_000_000, 5_000_000_000

_FLUX = {
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 128,
    "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
_FLUX_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True, "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None,
    "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
_CLIP = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
    "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "vocab_size": 49408,
}  # fmt: skip
_T5 = {
    "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
    "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24,
    "num_heads": 64, "num_layers": 24, "output_past": True, "pad_token_id": 0,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": True, "vocab_size": 32128,
}  # fmt: skip
_QWEN = {
    "_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0", "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56], "guidance_embeds": False, "in_channels": 64, "joint_attention_dim": 3584,
    "num_attention_heads": 24, "num_layers": 60, "out_channels": 16, "patch_size": 2,
}  # fmt: skip
_QWEN_TEXT = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000,
    "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0, "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu", "hidden_size": 1280,
    "in_channels": 3, "in_chans": 3, "initializer_range": 0.02, "intermediate_size": 3420,
    "model_type": "qwen2_5_vl", "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 2,
    "window_size": 112,
}  # fmt: skip
_QWEN_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **_QWEN_TEXT,
    "image_token_id": 151655, "text_config": {**_QWEN_TEXT, "model_type": "qwen2_5_vl_text"},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.53.1",
    "video_token_id": 151656, "vision_config": _QWEN_VISION, "vision_end_token_id": 151653,
    "vision_start_token_id": 151652, "vision_token_id": 151654,
}  # fmt: skip

_TIMESTEP = r"time_text_embed\.timestep_embedder\.linear_[12]"
#: The reference's LoRA targets by model; a pattern matches a linear's full name.
_TARGETS = {
    "flux": re.compile(
        r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
        r"|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)|" + _TIMESTEP
    ),
    # The last block's text output is unused, so its layers were not trained.
    "qwen": re.compile(r"transformer_blocks\.(\d+\.img_mlp|(?!59\.)\d+\.txt_mlp)\.net\.(0\.proj|2)|" + _TIMESTEP),
}


@dataclass(frozen=True)
class Component:
    """One folder of a checkpoint: its config, its bfloat16 tensors, and how its files are named and split."""

    folder: str
    config: dict[str, Any]
    shapes: Shapes = field(repr=False)
    stem: str = "diffusion_pytorch_model"
    max_shard_bytes: int = _SHARD_10GB
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})


def components(model: str) -> list[Component]:
    """Every component with weights of `model` ("flux" or "qwen"), the adapter last."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()  # it warns about each older config key

    def diffusion(config: dict[str, Any]) -> Shapes:
        cls = getattr(diffusers, config["_class_name"])
        with torch.device("meta"):
            return _shapes(cls.from_config(config))

    def encoder(config: dict[str, Any]) -> Shapes:
        (name,) = config["architectures"]
        cls = getattr(transformers, name)
        with torch.device("meta"):
            return _shapes(cls(cls.config_class.from_dict(config)))

    if model == "flux":
        transformer = diffusion(_FLUX)
        clip = {f"text_model.{k.removeprefix('text_model.')}": s for k, s in encoder(_CLIP).items()}
        t5 = encoder(_T5)
        t5.pop("encoder.embed_tokens.weight")  # tied to shared.weight, stored once
        base = [
            Component("transformer", _FLUX, transformer),
            Component("text_encoder", _CLIP, clip, "model"),
            Component("text_encoder_2", _T5, t5, "model", _SHARD_5GB),
            Component("vae", _FLUX_VAE, diffusion(_FLUX_VAE)),
        ]
        arc = "ArcFluxTransformer2DModel"
    else:
        transformer = diffusion(_QWEN)
        vae = diffusers.AutoencoderKLQwenImage
        with torch.device("meta"):
            module = vae()  # the class's defaults are the released sizes
        settings = {k: v for k, v in dict(module.config).items() if not k.startswith("_") and k != "input_channels"}
        vae_config = {"_class_name": vae.__name__, "_diffusers_version": "0.34.0.dev0", **settings}
        text = {
            k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): s
            for k, s in encoder(_QWEN_VL).items()
        }
        base = [
            Component("transformer", _QWEN, transformer, max_shard_bytes=_SHARD_5GB),
            Component("text_encoder", _QWEN_VL, text, "model", _SHARD_5GB),
            Component("vae", vae_config, _shapes(module)),
        ]
        arc = "ArcQwenImageTransformer2DModel"
    return [*base, _adapter(model, arc, base[0].config, transformer)]


def model_index(model: str) -> dict[str, Any]:
    """The pipeline's `model_index.json`."""
    flow = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    if model == "flux":
        return {
            "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0", "scheduler": flow,
            "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        }  # fmt: skip
    return {
        "_class_name": "QwenImagePipeline", "_diffusers_version": "0.34.0.dev0", "scheduler": flow,
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }  # fmt: skip


def scheduler(model: str) -> dict[str, Any]:
    """The scheduler's `scheduler_config.json`."""
    common = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256, "base_shift": 0.5, "num_train_timesteps": 1000, "use_dynamic_shifting": True,
    }  # fmt: skip
    if model == "flux":
        return {**common, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0}
    return {**common, "max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02}


def _shapes(module: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def _adapter(model: str, class_name: str, config: dict[str, Any], transformer: Shapes) -> Component:
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    k, p, channels = NUM_GAUSSIANS, LOGWEIGHTS_CHANNELS, config["in_channels"]
    heads = {"proj_out_means": k * channels, "proj_out_logweights": k * p, "proj_out_loggamma": (k - 1) * p}
    shapes: Shapes = {f"norm_out.linear.{leaf}": transformer[f"norm_out.linear.{leaf}"] for leaf in ("weight", "bias")}
    for head, rows in heads.items():
        shapes |= {f"{head}.weight": (rows, dim), f"{head}.bias": (rows,)}
    for key, shape in transformer.items():
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and _TARGETS[model].fullmatch(module):
            shapes[f"{module}.lora_A.weight"] = (RANK, shape[1])
            shapes[f"{module}.lora_B.weight"] = (shape[0], RANK)
    arc = {**config, "_class_name": class_name, "num_gaussians": k, "logweights_channels": p}
    # The student's class has no patch_size, and its config also holds defaults, which the base's config leaves out.
    del arc["patch_size"]
    arc |= {"axes_dims_rope": [16, 56, 56], "out_channels": None if model == "flux" else channels}
    metadata = {"format": "pt", "policy_config": '{"type": "ArcFlow"}'}
    return Component("adapter", arc, shapes, metadata=metadata)
