"""The reader of LoRA files: files in the conventions of many tools, each change against float64 or peft's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora.layers import LoraFile
from arcflow_runtime.lora.read import families_of, read_lora
from tests.checkpoints import GOLDEN
from tests.lora_files import FILES, FLUX, KOHYA, PEFT, RANK, File, Writer, _kohya, dotted, flat

#: Factors are exact in float32, but for those stored in float64, which are rounded once: 2 * 2^-24 of the sum of
#: magnitudes, for which the largest change times the rank is a bound. The product is computed here, in float64.
TOLERANCE = 2 * 2**-24 * 128


def changes(lora: LoraFile) -> dict[tuple[str, str], np.ndarray]:
    return {
        (layer.component, name): layer.scale * (layer.up.astype(np.float64) @ layer.down.astype(np.float64))
        for (_, name), layer in lora.layers.items()
    }


def assert_changes(lora: LoraFile, expected: dict[tuple[str, str], torch.Tensor]) -> None:
    found = changes(lora)
    assert found.keys() == expected.keys()
    for at, wanted in expected.items():
        error = np.abs(found[at] - wanted.double().numpy()).max()
        assert error <= TOLERANCE * wanted.abs().max(), (at, error)


@pytest.mark.parametrize("name", FILES)
def test_against_float64(tmp_path, name):
    file = FILES[name]()
    lora = read_lora(file.write(tmp_path), file.family)
    assert_changes(lora, file.expected)
    assert lora.tensors == len(file.tensors)
    for layer in lora.layers.values():
        assert layer.down.dtype == layer.up.dtype == np.float32
        assert not layer.down.flags.writeable and not layer.up.flags.writeable


# Files that peft and diffusers write, compared with the change that peft computes from its own layers.


def tiny(family: str, component: str = "transformer") -> torch.nn.Module:
    """A golden network, with its weights."""
    import diffusers
    import transformers

    name = "flux" if family == "flux" else "qwen"
    transformer = "FluxTransformer2DModel" if family == "flux" else "QwenImageTransformer2DModel"
    cls = getattr(diffusers, transformer) if component == "transformer" else transformers.CLIPTextModel
    return cls.from_pretrained(GOLDEN / f"{name}-tiny" / "base" / component)


def randomise(model: torch.nn.Module, dtype=torch.float32) -> None:
    """Give both factors random numbers; peft's B is zero at first."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)


def peft_changes(model: torch.nn.Module, component: str = "transformer") -> dict[tuple[str, str], torch.Tensor]:
    """peft's own change of every linear, in float64."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            (adapter,) = module.active_adapters
            module.double()
            plain = name.removeprefix("base_model.model.")
            plain = (
                f"text_model.{plain}" if component == "text_encoder" and not plain.startswith("text_model.") else plain
            )
            found[component, plain] = module.get_delta_weight(adapter).detach()
    return found


CONFIGS = {
    "alpha": {"lora_alpha": 8},
    "rsLoRA": {"lora_alpha": 8, "use_rslora": True},
    "alpha_pattern": {"lora_alpha": 8, "alpha_pattern": {"attn.to_k": 2, "net.2": 16}},
    "rank_pattern": {"lora_alpha": 6, "rank_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 2}},
    "both patterns": {"lora_alpha": 6, "rank_pattern": {"to_k": 8}, "alpha_pattern": {"to_k": 3, r"0\.attn\.to_q": 1}},
}


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_save_pretrained(tmp_path, family, config):
    from peft import LoraConfig, get_peft_model

    targets = ["to_q", "to_k", "to_v", "net.2", "net.0.proj", "norm_out.linear"]
    model = get_peft_model(tiny(family), LoraConfig(r=4, target_modules=targets, **CONFIGS[config]))
    randomise(model)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", family)
    assert_changes(lora, peft_changes(model))
    assert all("adapter_config.json" in layer.source for layer in lora.layers.values())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_save_lora_weights(tmp_path, config, dtype):
    from diffusers import FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer, clip = tiny("flux"), tiny("flux", "text_encoder")
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_out.0", "net.2"], **CONFIGS[config]))
    clip.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"]))
    for model in (transformer, clip):
        randomise(model, dtype)
    FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        text_encoder_lora_layers=get_peft_model_state_dict(clip),
        **_collate_lora_metadata({"transformer": transformer, "text_encoder": clip}),
    )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors", "flux")
    assert_changes(lora, peft_changes(transformer) | peft_changes(clip, "text_encoder"))


# What is refused, and what it says.

QUERY = "transformer.transformer_blocks.0.attn.to_q"
KOHYA_QUERY = "lora_unet_double_blocks_0_img_attn_proj"


def pair(key=QUERY, endings=PEFT, a=(RANK, 64), b=(64, RANK)) -> dict[str, torch.Tensor]:
    return {key + endings[0]: torch.ones(a), key + endings[1]: torch.ones(b)}


def tensor(value) -> torch.Tensor:
    return torch.tensor(value)


KOHYA_PAIR = pair(KOHYA_QUERY, KOHYA)
ALPHA = f"{KOHYA_QUERY}.alpha"
KINDS = "bundles take LoRAs of the linears of the transformer and the text encoders"
#: Tensors, metadata and adapter_config.json -> the message after "LoRA: ", with {p} for the file.
REFUSED: dict[str, tuple[File, str]] = {
    "no tensors": (File(), "{p} holds no LoRA factors; is it a LoRA?"),
    "only alpha": (
        File(tensors={ALPHA: tensor(1.0)}),
        f"{{p}}: '{ALPHA}' is an alpha without factors; save the LoRA again",
    ),
    "no B": (
        File(tensors={f"{QUERY}.lora_A.weight": torch.ones(4, 64)}),
        f"{{p}}: {QUERY}.lora_A.weight has no lora_B; save the LoRA again",
    ),
    "no A": (
        File(tensors={f"{KOHYA_QUERY}.lora_up.weight": torch.ones(64, 4)}),
        f"{{p}}: {KOHYA_QUERY}.lora_up.weight has no lora_A; save the LoRA again",
    ),
    "alpha NaN": (
        File(tensors=KOHYA_PAIR | {ALPHA: tensor(float("nan"))}),
        f"{{p}}: '{ALPHA}' must be a finite number, got nan; save the LoRA again",
    ),
    "alpha Inf": (
        File(tensors=KOHYA_PAIR | {ALPHA: tensor(float("inf"))}),
        f"{{p}}: '{ALPHA}' must be a finite number, got inf; save the LoRA again",
    ),
    "alpha of no elements": (
        File(tensors=KOHYA_PAIR | {ALPHA: torch.ones(0)}),
        f"{{p}}: '{ALPHA}' must be one number, got 0 in shape [0]; save the LoRA again",
    ),
    "alpha of two elements": (
        File(tensors=KOHYA_PAIR | {ALPHA: torch.ones(2)}),
        f"{{p}}: '{ALPHA}' must be one number, got 2 in shape [2]; save the LoRA again",
    ),
    "alpha true": (
        File(tensors=KOHYA_PAIR | {ALPHA: tensor(True)}),
        f"{{p}}: '{ALPHA}' must be a number, got dtype BOOL; save the LoRA again",
    ),
    "alpha null": (
        File(tensors=pair(), config={"lora_alpha": None}),
        "{p}: lora_alpha in adapter_config.json must be a finite number, got None; save the LoRA again",
    ),
    "alpha auto": (
        File(tensors=pair(), metadata={"lora_alpha": "auto"}),
        "{p}: lora_alpha in the metadata must be a finite number, got 'auto'; save the LoRA again",
    ),
    "alpha a list": (
        File(tensors=pair(), config={"lora_alpha": [8]}),
        "{p}: lora_alpha in adapter_config.json must be a finite number, got [8]; save the LoRA again",
    ),
    "alpha NaN in the metadata": (
        File(tensors=pair(), metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}),
        "{p}: lora_alpha in the metadata's lora_adapter_metadata (transformer) must be a finite number, got nan; "
        "save the LoRA again",
    ),
    "Kohya's alpha none": (
        File(tensors=pair(), metadata={"ss_network_alpha": "None"}),
        "{p}: the metadata's ss_network_alpha must be a finite number, got 'None'; save the LoRA again",
    ),
    "no alpha but a rank": (
        File(tensors=pair(), config={"r": 4}),
        "{p}: adapter_config.json must state lora_alpha, it has only r",
    ),
    "another rank": (
        File(tensors=pair(), config={"r": 8, "lora_alpha": 8}),
        "{p}: the factors of transformer_blocks.0.attn.to_q have rank 4, adapter_config.json says r 8; "
        "save the LoRA again",
    ),
    "metadata and config": (
        File(tensors=pair(), metadata={"lora_alpha": "8"}, config={"lora_alpha": 4}),
        "{p}: alpha of transformer_blocks.0.attn.to_q is 8 by lora_alpha in the metadata and 4 by lora_alpha in "
        "adapter_config.json; correct one of them",
    ),
    "tensor and config": (
        File(tensors=pair() | {f"{QUERY}.alpha": tensor(2.0)}, config={"lora_alpha": 4}),
        f"{{p}}: alpha of transformer_blocks.0.attn.to_q is 2 by key '{QUERY}.alpha' and 4 by lora_alpha in "
        "adapter_config.json; correct one of them",
    ),
    "tensors and Kohya's metadata": (
        File(tensors=KOHYA_PAIR | {ALPHA: tensor(2.0)}, metadata={"ss_network_alpha": "8"}),
        f"{{p}}: alpha is 2 by key '{ALPHA}' and 8 by the metadata's ss_network_alpha; correct one of them",
    ),
    "Kohya's metadata and config": (
        File(tensors=pair(), metadata={"ss_network_alpha": "8"}, config={"lora_alpha": 4}),
        "{p}: alpha of transformer_blocks.0.attn.to_q is 4 by lora_alpha in adapter_config.json and 8 by the "
        "metadata's ss_network_alpha; correct one of them",
    ),
    "rsLoRA in one place": (
        File(
            tensors=pair(),
            metadata={"lora_alpha": "4", "use_rslora": "True"},
            config={"use_rslora": False, "lora_alpha": 4},
        ),
        "{p}: use_rslora is true in one and false in the other of the metadata and adapter_config.json; "
        "correct one of them",
    ),
    "a pattern that takes for ever": (
        File(tensors=pair(), config={"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 4}}),
        "{p}: adapter_config.json: alpha_pattern: the pattern '(a+)+$' is too complex; name the modules one by one",
    ),
    "a pattern that is none": (
        File(tensors=pair(), config={"lora_alpha": 4, "alpha_pattern": {"to_q(": 4}}),
        "{p}: adapter_config.json: alpha_pattern: 'to_q(' is not a regular expression (missing ), unterminated "
        "subpattern at position 4); save the LoRA again",
    ),
    "patterns in a list": (
        File(tensors=pair(), config={"lora_alpha": 4, "alpha_pattern": ["to_q"]}),
        "{p}: adapter_config.json: alpha_pattern must be an object, got ['to_q']",
    ),
    "PiSSA": (
        File(tensors=pair(), config={"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}),
        "{p}: adapter_config.json says init_lora_weights 'pissa_niter_4', which also changed the base's weights; "
        "convert it to a plain LoRA with peft's path_initial_model_for_weight_conversion",
    ),
    "another method": (
        File(tensors=pair(), config={"peft_type": "LOHA"}),
        "{p}: adapter_config.json says peft_type 'LOHA', it must be 'LORA'; give a plain LoRA",
    ),
    "DoRA in the config": (
        File(tensors=pair(), config={"lora_alpha": 4, "use_dora": True}),
        "{p}: adapter_config.json sets use_dora: DoRA is not supported; give a plain LoRA",
    ),
    "biases in the config": (
        File(tensors=pair(), config={"lora_alpha": 4, "bias": "all"}),
        "{p}: adapter_config.json sets bias: trained biases are not supported; give a plain LoRA",
    ),
    "metadata that is no JSON": (
        File(tensors=pair(), metadata={"lora_adapter_metadata": "{"}),
        "{p}: its metadata lora_adapter_metadata is not valid JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); save the LoRA again",
    ),
    "metadata that is a list": (
        File(tensors=pair(), metadata={"lora_adapter_metadata": "[]"}),
        "{p}: its metadata lora_adapter_metadata must hold a JSON object, got list; save the LoRA again",
    ),
    "DoRA": (
        File(tensors=pair() | {f"{QUERY}.dora_scale": torch.ones(64)}),
        f"{{p}} is a DoRA ({QUERY}.dora_scale), which is not supported; give a plain LoRA",
    ),
    "peft's DoRA": (
        File(tensors=pair() | {f"{QUERY}.lora_magnitude_vector": torch.ones(64)}),
        f"{{p}} is a DoRA ({QUERY}.lora_magnitude_vector), which is not supported; give a plain LoRA",
    ),
    **{
        f"kind {key}": (
            File(tensors=pair() | {key: torch.ones(4, 4)}),
            f"{{p}}: key '{key}' is {kind}, which is not supported; {KINDS}",
        )
        for key, kind in {
            "lora_unet_single_blocks_0_linear2.lokr_w1": "LoKr",
            "lora_unet_single_blocks_0_linear2.hada_w1_a": "LoHa",
            "lora_unet_single_blocks_0_linear2.oft_blocks": "OFT",
            "lora_unet_single_blocks_0_linear2.lora_mid.weight": "a Tucker factor of a convolution (LoCon)",
            "lora_unet_single_blocks_0_linear2.a1.weight": "GLoRA",
            f"{QUERY}.lora_B.bias": "a bias of a factor",
            f"{QUERY}.lora_A.default.bias": "a bias of a factor",
            f"{KOHYA_QUERY}.lora_up.bias": "a bias of a factor",
            f"{KOHYA_QUERY}.diff": "a change of a whole weight",
            f"{KOHYA_QUERY}.diff_b": "a change of a bias",
            "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm": "a change of a norm",
            "transformer.transformer_blocks.0.attn.norm_q.weight": "a norm",
            "double_blocks.0.img_attn.norm.query_norm.scale": "a norm",
            "transformer.some_bn.running_mean": "a batch norm",
            "transformer.x_embedder.bias": "a bias",
            "transformer.x_embedder.weight": "a whole weight",
            "bundle_emb.ink.clip_l": "a trained embedding",
            "text_encoder.embeddings.lora_embedding_A": "a factor of an embedding",
            f"{QUERY}.scale_weight": "a scale of a quantised file",
        }.items()
    },
    "two adapters": (
        File(
            tensors=pair(QUERY, (".lora_A.a.weight", ".lora_B.a.weight"))
            | pair(QUERY.replace("to_q", "to_k"), (".lora_A.b.weight", ".lora_B.b.weight"))
        ),
        "{p} must hold one adapter, got 'a', 'b'; save each to its own file",
    ),
    "one factor twice": (
        File(tensors=pair() | {f"{QUERY}.lora_A.default.weight": torch.ones(4, 64)}),
        f"{{p}}: '{QUERY}.lora_A.default.weight' and '{QUERY}.lora_A.weight' are the same factor; remove one",
    ),
    "one linear in two namings": (
        File(tensors=pair() | pair("lora_unet_double_blocks_0_img_attn_qkv", KOHYA, b=(192, RANK))),
        f"{{p}}: 'lora_unet_double_blocks_0_img_attn_qkv' and '{QUERY}' both change transformer_blocks.0.attn.to_q; "
        "remove one of them",
    ),
    "unknown key": (
        File(tensors=pair() | {"whatever": torch.ones(2), "whatever.else": torch.ones(2)}),
        f"{{p}}: key 'whatever' and 1 more is not understood; {KINDS}",
    ),
    "unknown linear": (
        File(tensors=pair("transformer.transformer_blocks.0.attn.to_w")),
        "{p}: key 'transformer.transformer_blocks.0.attn.to_w.lora_A.weight' is not understood; " + KINDS,
    ),
    "rank 0": (
        File(tensors=pair(a=(0, 64), b=(64, 0))),
        f"{{p}}: '{QUERY}' must be A [r, in] and B [out, r] with r at least 1, got A [0, 64] and B [64, 0]",
    ),
    "no dimensions": (
        File(tensors=pair(a=(), b=())),
        f"{{p}}: '{QUERY}' must be A [r, in] and B [out, r] with r at least 1, got A [] and B []",
    ),
    "ranks differ": (
        File(tensors=pair(b=(64, 3))),
        f"{{p}}: '{QUERY}' must be A [r, in] and B [out, r] with r at least 1, got A [4, 64] and B [64, 3]",
    ),
    "a convolution of 3 x 3": (
        File(tensors=pair(a=(4, 64, 3, 3), b=(64, 4, 1, 1))),
        f"{{p}}: '{QUERY}' must be A [r, in] and B [out, r] with r at least 1, got A [4, 64, 3, 3] and B [64, 4, 1, 1]",
    ),
    "NaN": (
        File(tensors=pair() | {f"{QUERY}.lora_B.weight": torch.full((64, 4), float("nan"))}),
        f"{{p}}: '{QUERY}.lora_B.weight' holds 256 NaN or infinite values; the file is damaged or the training "
        "diverged",
    ),
    "integers": (
        File(tensors=pair() | {f"{QUERY}.lora_B.weight": torch.ones(64, 4, dtype=torch.int8)}),
        f"{{p}}: '{QUERY}.lora_B.weight' has dtype I8, factors must have one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2; "
        "use the file before it was quantised",
    ),
    "qkv that is not three": (
        File(tensors=pair("double_blocks.0.img_attn.qkv", b=(64, RANK))),
        "{p}: 'double_blocks.0.img_attn.qkv.lora_B.weight' must have a multiple of 3 rows, got 64; "
        "it was trained for another model",
    ),
    "linear1 without the MLP": (
        File(tensors=pair("single_blocks.0.linear1", b=(192, RANK))),
        "{p}: 'single_blocks.0.linear1.lora_B.weight' must have more than 192 rows, 3 times the input and the MLP, "
        "got 192; it was trained for another model",
    ),
    "Qwen-Image's": (
        File(tensors=pair("transformer.transformer_blocks.0.img_mlp.net.2")),
        "{p} is a LoRA for Qwen-Image, the model is FLUX.1; give a LoRA for this model",
    ),
    "FLUX's": (
        File("qwen-image", tensors=KOHYA_PAIR),
        "{p} is a LoRA for FLUX.1, the model is Qwen-Image; give a LoRA for this model",
    ),
    "FLUX's by its metadata": (
        File("qwen-image", tensors=pair(), metadata={"modelspec.architecture": "flux-1-dev/lora"}),
        "{p} is a LoRA for FLUX.1, the model is Qwen-Image; give a LoRA for this model",
    ),
    "Stable Diffusion's": (
        File(tensors=pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", KOHYA)),
        "{p} is a LoRA for Stable Diffusion, the model is FLUX.1; give a LoRA for this model",
    ),
    "Stable Diffusion 3's": (
        File(tensors=pair("diffusion_model.joint_blocks.0.x_block.attn.qkv")),
        "{p} is a LoRA for Stable Diffusion 3, the model is FLUX.1; give a LoRA for this model",
    ),
    "only the replaced projection": (
        File(tensors=pair("transformer.proj_out")),
        "{p} changes nothing: 'transformer.proj_out' is a layer that the student's heads replace; give another LoRA",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    file, message = REFUSED[name]
    path = file.write(tmp_path)
    with pytest.raises(LoraError) as error:
        read_lora(path, file.family)
    assert str(error.value) == "LoRA: " + message.replace("{p}", str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "{p} has only 0 bytes; it is truncated, download it again"),
        (b"PK\x03\x04" + b"x" * 40, "{p} is a pickle, which can run code when read; convert it to safetensors"),
        (b"\x80\x02" + b"x" * 40, "{p} is a pickle, which can run code when read; convert it to safetensors"),
        (b"version https://git-lfs", "{p} is a Git LFS pointer, not the weights; run `git lfs pull`"),
        (
            b"\xff" * 64,
            "{p} is not a valid safetensors file (Error while deserializing header: header too large); "
            "download it again",
        ),
    ],
    ids=["empty", "zip", "pickle", "lfs", "header"],
)
def test_a_file_that_is_no_safetensors(tmp_path, data, message):
    path = tmp_path / "style.safetensors"
    path.write_bytes(data)
    with pytest.raises(LoraError) as error:
        read_lora(path, "flux")
    assert str(error.value) == "LoRA: " + message.replace("{p}", str(path))


def test_a_truncated_file(tmp_path):
    path = File(tensors=pair()).write(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        LoraError, match=r"style\.safetensors is not a valid safetensors file \(.*\); download it again$"
    ):
        read_lora(path, "flux")


def test_a_key_twice(tmp_path):
    path = File(tensors=pair()).write(tmp_path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    key = f'"{QUERY}.lora_A.weight"'
    entry = json.loads(header)[key.strip('"')]
    twice = (header[:-1] + f",{key}:{json.dumps(entry)}}}").encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    with pytest.raises(LoraError) as error:
        read_lora(path, "flux")
    assert f"{QUERY}.lora_A.weight" in str(error.value)


def test_what_is_not_used_is_named(tmp_path):
    reasons = {
        "position_ids": "is a buffer that the model computes itself",
        "changes by zero": "is a change of a bias by zero",
        "the replaced projection": "is a layer that the student's heads replace",
    }
    for name, reason in reasons.items():
        file = FILES[name]()
        assert reason in [s.reason for s in read_lora(file.write(tmp_path / name), "flux").skipped]


def test_a_pattern_without_effect_is_named(tmp_path):
    file = File(tensors=pair(), config={"lora_alpha": 4, "alpha_pattern": {"attn.to_w": 2}})
    (skipped,) = read_lora(file.write(tmp_path), "flux").skipped
    assert (skipped.key, skipped.reason) == (
        "alpha_pattern 'attn.to_w' in adapter_config.json",
        "matches no module of the file",
    )


def test_blocks_of_zeros_are_left_out(tmp_path):
    file = FILES["kohya, split_qkv"]()
    lora = read_lora(file.write(tmp_path), "flux")
    assert {layer.rank for layer in lora.layers.values()} == {2}
    assert {layer.file_rank for layer in lora.layers.values()} == {6, 8}


def test_a_fused_linear_shares_its_factor(tmp_path):
    lora = read_lora(_kohya(keep=lambda n: n == "double_blocks.0.img_attn.qkv").file.write(tmp_path), "flux")
    first, *others = (layer.down for layer in lora.layers.values())
    assert len(others) == 2 and all(np.shares_memory(first, other) for other in others)


def test_a_part_of_zeros_is_named(tmp_path):
    tensors = pair("double_blocks.0.img_attn.qkv", b=(192, RANK))
    tensors["double_blocks.0.img_attn.qkv.lora_B.weight"][64:128] = 0
    lora = read_lora(File(tensors=tensors).write(tmp_path), "flux")
    assert sorted(name for _, name in lora.layers) == [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_v")]
    assert [(s.key, s.reason) for s in lora.skipped] == [
        (
            "double_blocks.0.img_attn.qkv",
            "changes nothing in transformer_blocks.0.attn.to_k: its rows of B are all zeros",
        )
    ]


def test_adapter_config_of_another_file(tmp_path):
    File(tensors=pair(), config={"lora_alpha": 8}).write(tmp_path, "adapter_model.safetensors")
    other = File(tensors=pair()).write(tmp_path, "other.safetensors")
    (layer,) = read_lora(other, "flux").layers.values()
    assert (layer.scale, layer.source) == (1.0, "no alpha stated")
    (layer,) = read_lora(tmp_path / "adapter_model.safetensors", "flux").layers.values()
    assert (layer.scale, layer.source) == (2.0, "alpha 8 (lora_alpha in adapter_config.json) / 4")


def test_single_layers_may_differ_from_kohyas_metadata(tmp_path):
    file = Writer().all(dict(list(FLUX.items())[:2]), dotted("transformer."), endings=KOHYA, alpha=2).file
    key = next(k for k in file.tensors if k.endswith(".alpha"))
    file.tensors[key] = torch.tensor(8.0)
    file.metadata = {"ss_network_alpha": "8"}
    assert sorted(layer.scale for layer in read_lora(file.write(tmp_path), "flux").layers.values()) == [0.5, 2.0]
    file.metadata = {"ss_network_alpha": "Dynamic"}
    assert sorted(layer.scale for layer in read_lora(file.write(tmp_path), "flux").layers.values()) == [0.5, 2.0]


def test_families_of(tmp_path):
    assert families_of(_kohya().file.write(tmp_path)) == ["flux"]
    assert families_of(FILES["Qwen, diffusers"]().write(tmp_path)) == ["qwen-image"]
    assert families_of(File(tensors=pair()).write(tmp_path)) == ["flux", "qwen-image"]
    named = File(tensors=pair(), metadata={"ss_base_model_version": "qwen_image"})
    assert families_of(named.write(tmp_path)) == ["qwen-image"]
    assert families_of(File(tensors=pair("lora_unet_nothing", KOHYA)).write(tmp_path)) == []


def test_every_float8(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        codes = codes[codes.float().isfinite()]
        file = File(tensors={f"{QUERY}.lora_A.weight": codes[None], f"{QUERY}.lora_B.weight": codes[:, None]})
        (layer,) = read_lora(file.write(tmp_path), "flux").layers.values()
        np.testing.assert_array_equal(layer.down, codes[None].float().numpy())


def test_flat_names_have_no_doubles():
    from arcflow_runtime.lora.families import FAMILIES

    for family in FAMILIES.values():
        spelt = [(target.component, name) for name, target in family.entries()]
        flat_names = [(component, flat("")(name)) for component, name in spelt]
        assert len(set(flat_names)) == len(set(spelt))


@pytest.mark.parametrize("length", [0x4B50, 0x10280, 0x20480])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, length):
    """The file begins with the length of the header, here with the bytes "PK" or 80 02 or 80 04."""
    from arcflow_export.checkpoint.tensors import TensorIndex

    path = File(tensors=pair()).write(tmp_path)
    data = path.read_bytes()
    old = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + old].ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + data[8 + old :])
    assert len(read_lora(path, "flux").layers) == 1
    assert len(TensorIndex.open(path, "LoRA")) == 2


def test_damaged_files_give_an_error_or_a_lora(tmp_path):
    """Any byte of the header may be changed; nothing but a `LoraError` is raised."""
    generator = np.random.default_rng(0)
    path = (FILES["kohya, split_qkv"]()).write(tmp_path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, end, 2):
            damaged[place] = generator.integers(32, 127)
        path.write_bytes(damaged)
        try:
            read_lora(path, "flux")
        except LoraError:
            refused += 1
    assert refused > 150  # most changes hit a name, an offset or a shape


SETTINGS = ("lora_alpha", "r", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "bias", "peft_type")


@pytest.mark.parametrize("value", [None, True, False, 0, -1.5, "", "4", "x", [], [1], {}, {"to_q": None}, 1e400])
@pytest.mark.parametrize("setting", [*SETTINGS, "init_lora_weights", "modules_to_save"])
def test_any_value_of_a_setting_gives_an_error_or_a_lora(tmp_path, setting, value):
    path = File(tensors=pair(), config={"lora_alpha": 4, setting: value}).write(tmp_path)
    message = None
    try:
        lora = read_lora(path, "flux")
    except LoraError as e:
        message = str(e)
    if message is None:
        assert all(np.isfinite(layer.scale) for layer in lora.layers.values())
    else:
        assert "adapter_config.json" in message
