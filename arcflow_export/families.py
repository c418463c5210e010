"""What is particular to each model family before it is a bundle: one table, by the manifest's `family`.

Names of classes and files only, so that it is light to import. Code that differs by family stands in tables of the same
keys: `models.families` makes the parts, `student.families` runs the student in torch. The runtime's own facts are in
`arcflow_runtime.disk.families`. Nothing else compares a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from arcflow_export.errors import SourceError

#: Length to which CLIP's ids are padded.
CLIP_TOKENS = 77
#: Channels of a packed token, 2 x 2 latent pixels of 16 channels; those of inpainting and control models are more.
PACKED_CHANNELS = 64
#: Settings of a transformer that no supported base has.
UNSUPPORTED_SETTINGS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


@dataclass(frozen=True)
class Folder:
    """One folder of a base: text files, fetched where the checkpoint has them, and the stem of its weights' names."""

    name: str
    texts: tuple[str, ...] = ("config.json",)
    stem: str | None = None


@dataclass(frozen=True)
class FamilyFacts:
    """One family.

    Args:
        pipeline: diffusers' class, as model_index.json names it.
        transformer: diffusers' class of the network.
        adapter: the student's class in an adapter's config.json.
        adapter_sizes: the base's settings that an adapter's config.json repeats.
        adapter_out_channels: whether an adapter's config.json says how many channels a packed token has.
        encoders: transformers' class of each text encoder, by component.
        folders: what is read of a base. Beside them a repository has pictures, pickles, other precisions and, in
            FLUX's root, the whole model again in its authors' format.
        pad_tokenizers: the tokenizers whose padding ids a manifest's `text` holds, by key.
        clip_tokens: the length to which CLIP's ids are padded.
        template: the chat template, with one {} for the prompt.
        drop_tokens: leading text states to drop, those of the template before the prompt.
        policy: preset that says what to quantise.
        calibrated: parts besides the backbone that can be calibrated, and the module of diffusers' pipeline below
            which the part's layer names are found.
        lora_targets: linears that get LoRA factors in distillation, by the end of their names, as in the released
            adapters.
        lora_alphas: whether diffusers' LoRA converter gives the alphas apart from the factors.
        unused_last: start of the names, after the block's, of linears of the last block whose result is not used.
    """

    pipeline: str
    transformer: str
    adapter: str
    adapter_sizes: tuple[str, ...]
    adapter_out_channels: bool
    encoders: Mapping[str, str]
    folders: tuple[Folder, ...]
    pad_tokenizers: Mapping[str, str]
    clip_tokens: int | None
    template: str | None
    drop_tokens: int
    policy: str
    calibrated: Mapping[str, str]
    lora_targets: tuple[str, ...]
    lora_alphas: bool
    unused_last: str | None


_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
_BPE = (*_TOKENIZER, "vocab.json", "merges.txt")
_SCHEDULER = Folder("scheduler", ("scheduler_config.json",))
_NETWORKS = (Folder("transformer", stem="diffusion_pytorch_model"), Folder("vae", stem="diffusion_pytorch_model"))

FAMILIES: dict[str, FamilyFacts] = {
    "flux": FamilyFacts(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        adapter="ArcFluxTransformer2DModel",
        adapter_sizes=(
            "in_channels",
            "num_layers",
            "num_single_layers",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "pooled_projection_dim",
            "guidance_embeds",
            "axes_dims_rope",
        ),
        adapter_out_channels=False,
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        folders=(
            _SCHEDULER,
            Folder("tokenizer", _BPE),
            Folder("tokenizer_2", (*_TOKENIZER, "spiece.model")),
            Folder("text_encoder", stem="model"),
            Folder("text_encoder_2", stem="model"),
            *_NETWORKS,
        ),
        pad_tokenizers={"clip_pad_token_id": "tokenizer", "t5_pad_token_id": "tokenizer_2"},
        clip_tokens=CLIP_TOKENS,
        template=None,
        drop_tokens=0,
        policy="flux",
        # CLIP is a hundredth of the weights and stays as it is.
        calibrated={"text_encoder_2": "text_encoder_2.encoder"},
        lora_targets=(
            ".proj_mlp",
            ".proj_out",
            ".ff.net.0.proj",
            ".ff.net.2",
            ".ff_context.net.0.proj",
            ".ff_context.net.2",
            ".timestep_embedder.linear_1",
            ".timestep_embedder.linear_2",
        ),
        lora_alphas=True,
        unused_last=None,
    ),
    "qwen-image": FamilyFacts(
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        adapter="ArcQwenImageTransformer2DModel",
        adapter_sizes=(
            "in_channels",
            "num_layers",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "axes_dims_rope",
        ),
        # The base's own out_channels counts latent channels, the adapter's those of a packed token.
        adapter_out_channels=True,
        encoders={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        folders=(
            _SCHEDULER,
            Folder("tokenizer", _BPE),
            Folder("text_encoder", ("config.json", "generation_config.json"), "model"),
            *_NETWORKS,
        ),
        pad_tokenizers={},
        clip_tokens=None,
        # diffusers' QwenImagePipeline: the system prompt, and how many of its tokens are dropped from the states.
        template=(
            "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
        drop_tokens=34,
        policy="qwen-image",
        calibrated={"text_encoder": "text_encoder.model.language_model"},
        lora_targets=(
            ".img_mlp.net.0.proj",
            ".img_mlp.net.2",
            ".txt_mlp.net.0.proj",
            ".txt_mlp.net.2",
            ".timestep_embedder.linear_1",
            ".timestep_embedder.linear_2",
        ),
        lora_alphas=False,
        unused_last="txt_mlp.",
    ),
}


def facts(family: str) -> FamilyFacts:
    """The facts about a family.

    Raises:
        SourceError: it is not in the table.
    """
    if family not in FAMILIES:
        raise SourceError(f"family must be one of {list(FAMILIES)}, got {family!r}; see CONTRIBUTING.md to add one")
    return FAMILIES[family]


def family_of_pipeline(name: object) -> str | None:
    """The family of a pipeline class of diffusers; None if it is not supported."""
    return next((family for family, found in FAMILIES.items() if found.pipeline == name), None)


def family_of_adapter(name: object) -> str | None:
    """The family of a student's class; None if it is not supported."""
    return next((family for family, found in FAMILIES.items() if found.adapter == name), None)


def pipelines() -> list[str]:
    """The pipeline classes that are supported, sorted."""
    return sorted(found.pipeline for found in FAMILIES.values())


def adapter_sizes() -> list[str]:
    """Every setting of a base that an adapter of any family repeats."""
    return list(dict.fromkeys(chain.from_iterable(found.adapter_sizes for found in FAMILIES.values())))
