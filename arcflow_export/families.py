"""The table of model families for export and training; the key is the manifest's `family`.

It holds only names of classes and files, so that it is light to import. Code that differs by family is in two tables
with the same keys: `models.families` makes the parts, `student.families` runs the student in torch. The runtime's facts
are in `arcflow_runtime.disk.families`. No other module compares a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from arcflow_export.errors import SourceError

#: Length to which CLIP's ids are padded.
CLIP_TOKENS = 77
#: Channels of a packed token: 2 x 2 latent pixels with 16 channels each. Inpainting and control models have more.
PACKED_CHANNELS = 64
#: Settings of a transformer's config that must not be set in a supported base.
UNSUPPORTED_SETTINGS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


@dataclass(frozen=True)
class Folder:
    """One folder of a base: the text files to download if they exist, and the stem of its weight files' names."""

    name: str
    texts: tuple[str, ...] = ("config.json",)
    stem: str | None = None


@dataclass(frozen=True)
class FamilyFacts:
    """The facts about one family.

    Args:
        pipeline: diffusers' pipeline class, as in model_index.json.
        transformer: diffusers' class of the transformer.
        adapter: the student's class in an adapter's config.json.
        adapter_sizes: the base's settings that an adapter's config.json repeats.
        adapter_out_channels: True if an adapter's config.json gives the channels of a packed token as `out_channels`.
        encoders: transformers' class of each text encoder, by component.
        folders: the folders of a base that are used. A repository also has images, pickles, other precisions and, in
            FLUX's root, the whole model again in its authors' format.
        pad_tokenizers: for each key of a manifest's `text` that holds a padding id, the tokenizer that it comes from.
        clip_tokens: length to which CLIP's ids are padded; None without CLIP.
        template: chat template, with one {} for the prompt; None without a template.
        drop_tokens: number of leading text states to drop: those of the template before the prompt.
        policy: name of the default quantisation policy.
        calibrated: parts besides the backbone that can be calibrated, each with the module of diffusers' pipeline below
            which its layer names are valid.
        lora_targets: name endings of the linears that get LoRA factors in distillation, as in the released adapters.
        unused_last: beginning of the names, inside the last block, of linears whose output is unused.
        steps: usual number of steps of the base itself.
        distilled_steps: that of the base without guidance that was distilled to few steps; None if there is none.
        true_cfg_scale: the base's usual scale of guidance with a negative prompt; None if it is guided otherwise.
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
    unused_last: str | None
    steps: int
    distilled_steps: int | None
    true_cfg_scale: float | None


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
        # CLIP has only a hundredth of the weights, so it is never quantised.
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
        unused_last=None,
        # The defaults of diffusers' FluxPipeline, and of FLUX.1-schnell's model card.
        steps=28,
        distilled_steps=4,
        true_cfg_scale=None,
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
        # The base's own out_channels counts latent channels; the adapter's counts the channels of a packed token.
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
        # From diffusers' QwenImagePipeline: the system prompt, and the number of its tokens to drop from the states.
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
        unused_last="txt_mlp.",
        # The defaults of diffusers' QwenImagePipeline.
        steps=50,
        distilled_steps=None,
        true_cfg_scale=4.0,
    ),
}


def facts(family: str) -> FamilyFacts:
    """The facts about a family.

    Raises:
        SourceError: the family is not in the table.
    """
    if family not in FAMILIES:
        raise SourceError(f"family must be one of {list(FAMILIES)}, got {family!r}; see CONTRIBUTING.md to add one")
    return FAMILIES[family]


def family_of_pipeline(name: object) -> str | None:
    """The family of a diffusers pipeline class; None if the class is not supported."""
    return next((family for family, found in FAMILIES.items() if found.pipeline == name), None)


def family_of_adapter(name: object) -> str | None:
    """The family of a student's class in an adapter's config.json; None if the class is not supported."""
    return next((family for family, found in FAMILIES.items() if found.adapter == name), None)


def pipelines() -> list[str]:
    """The supported pipeline classes, sorted."""
    return sorted(found.pipeline for found in FAMILIES.values())


def adapter_sizes() -> list[str]:
    """All settings of a base that the adapters of any family repeat."""
    return list(dict.fromkeys(chain.from_iterable(found.adapter_sizes for found in FAMILIES.values())))
