"""Style LoRAs: every naming gives W + scale * alpha / r * B A on the right module, and the rest is refused by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from arcflow_export.checkpoint.sources import Location
from arcflow_export.errors import SourceError
from arcflow_export.student.load import Student
from arcflow_runtime.lora.argument import parse_lora
from tests.checkpoints import make_style
from tests.conftest import golden_student

#: A module that the ArcFlow adapter leaves alone and one that it changes too, with (out, in).
QUERY, FEED = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.0.proj"
QWEN_FEED = "transformer_blocks.0.img_mlp.net.0.proj"
A, B = torch.randn(2, 64, generator=torch.manual_seed(0)), torch.randn(64, 2, generator=torch.manual_seed(1))
WIDE_B = torch.randn(256, 2, generator=torch.manual_seed(2))


@pytest.fixture
def style(tmp_path):
    """A function (tensors, metadata) -> the golden student with that LoRA on top."""
    path = tmp_path / "style.safetensors"

    def load(tensors, family="flux", scale=1.0, adapter=None) -> Student:
        metadata = None if adapter is None else {"lora_adapter_metadata": json.dumps(adapter)}
        write(tensors, path, metadata)
        return golden_student(f"{family}-tiny", [(Location(str(path)), scale)])

    load.path = path
    return load


def write(tensors, path, metadata=None):
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, path, metadata)


def change(student: Student, module: str, part: str = "backbone") -> torch.Tensor:
    """What the LoRA adds to a module's weight: the student's merged weight less the one without the LoRA."""
    plain = golden_student("flux-tiny" if student.family == "flux" else "qwen-tiny")
    with_lora, without = (
        torch.cat(list(s.source(part).blocks(f"{module}.weight", torch.float32))) for s in (student, plain)
    )
    return with_lora.double() - without.double()


def assert_adds(student: Student, module: str, expected: torch.Tensor, part: str = "backbone") -> None:
    # Two float32 weights below 32 are subtracted, each with up to 4 roundings of half a unit.
    assert (change(student, module, part) - expected.double()).abs().max() <= 8 * 2**-24 * 32
    assert expected.abs().max() > 1


def diffusers_naming(prefix="transformer."):
    return {f"{prefix}{QUERY}.lora_A.weight": A, f"{prefix}{QUERY}.lora_B.weight": B} | {
        f"{prefix}{FEED}.lora_A.weight": A,
        f"{prefix}{FEED}.lora_B.weight": WIDE_B,
    }


@pytest.mark.parametrize(
    ("adapter", "factor"),
    [
        (None, 1.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 6}, 3.0),
        ({"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.use_rslora": True}, 6 / 2**0.5),
        ({"transformer.lora_alpha": 6, "transformer.alpha_pattern": {QUERY: 1.0, FEED: 1.0}}, 0.5),
    ],
)
def test_diffusers_naming(style, adapter, factor):
    student = style(diffusers_naming(), scale=0.8, adapter=adapter)
    assert_adds(student, QUERY, 0.8 * factor * B @ A)
    assert_adds(student, FEED, 0.8 * factor * WIDE_B @ A)
    assert change(student, "transformer_blocks.1.attn.to_q").abs().max() == 0


def test_without_prefix(style):
    assert_adds(style(diffusers_naming(prefix="")), QUERY, B @ A)


def test_alpha_as_a_tensor(style):
    student = style(diffusers_naming() | {f"transformer.{m}.alpha": torch.tensor(5.0) for m in (QUERY, FEED)})
    assert_adds(student, QUERY, 2.5 * B @ A)


def kohya(name, a, b, alpha):
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(alpha)}


def test_kohya_naming(style):
    qkv = torch.randn(192, 2, generator=torch.manual_seed(3))
    tensors = kohya("lora_unet_double_blocks_0_img_attn_qkv", A, qkv, 1.0)
    tensors |= kohya("lora_unet_double_blocks_0_img_mlp_0", A, WIDE_B, 4.0)
    tensors |= kohya("lora_unet_single_blocks_1_modulation_lin", A, qkv, 2.0)
    student = style(tensors, scale=-0.5)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        assert_adds(student, f"transformer_blocks.0.attn.{name}", -0.5 * 0.5 * qkv[64 * i : 64 * (i + 1)] @ A)
    assert_adds(student, FEED, -0.5 * 2 * WIDE_B @ A)
    assert_adds(student, "single_transformer_blocks.1.norm.linear", -0.5 * qkv @ A, "conditioner")


def test_kohya_text_encoder(style):
    b = torch.randn(32, 2, generator=torch.manual_seed(4))
    tensors = kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", A[:, :32], b, 2.0)
    student = style(tensors | kohya("lora_unet_double_blocks_0_img_attn_proj", A, B, 2.0))
    assert_adds(student, "text_model.encoder.layers.0.self_attn.q_proj", b @ A[:, :32], "text_encoder")
    assert student.styles[0].pairs.keys() == {"transformer", "text_encoder"}


def test_kohya_t5(style):
    b = torch.randn(32, 2, generator=torch.manual_seed(4))
    student = style(kohya("lora_te3_encoder_block_1_layer_0_SelfAttention_q", A, b, 1.0))
    assert_adds(student, "encoder.block.1.layer.0.SelfAttention.q", 0.5 * b @ A, "text_encoder_2")


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder."])
def test_text_encoder_with_and_without_its_prefix(style, prefix):
    b = torch.randn(32, 2, generator=torch.manual_seed(4))
    name = f"{prefix}encoder.layers.1.mlp.fc2"
    student = style(
        {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": b},
        adapter={"text_encoder.lora_alpha": 1},
    )
    assert_adds(student, "text_model.encoder.layers.1.mlp.fc2", 0.5 * b @ A, "text_encoder")


@pytest.mark.parametrize(
    ("tensors", "factor"),
    [
        ({f"transformer.{QWEN_FEED}.lora_A.weight": A, f"transformer.{QWEN_FEED}.lora_B.weight": WIDE_B}, 1.0),
        ({f"diffusion_model.{QWEN_FEED}.lora_A.weight": A, f"diffusion_model.{QWEN_FEED}.lora_B.weight": WIDE_B}, 1.0),
        (kohya("lora_unet_transformer_blocks_0_img_mlp_net_0_proj", A, WIDE_B, 1.0), 0.5),
        (
            {f"transformer.{QWEN_FEED}.lora_A.weight": A, f"transformer.{QWEN_FEED}.lora_B.weight": WIDE_B}
            | {f"transformer.{QWEN_FEED}.alpha": torch.tensor(1.0)},
            0.5,
        ),
    ],
    ids=["diffusers", "original", "kohya", "alpha"],
)
def test_qwen_namings(style, tensors, factor):
    assert_adds(style(tensors, "qwen", scale=2.0), QWEN_FEED, 2.0 * factor * WIDE_B @ A)


def test_loras_add_up(tmp_path):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.safetensors")
        write(diffusers_naming(), paths[-1])
    student = golden_student("flux-tiny", [(Location(str(paths[0])), 0.25), (Location(str(paths[1])), 0.5)])
    assert_adds(student, QUERY, 0.75 * B @ A)
    assert [s.scale for s in student.styles] == [0.25, 0.5]


def test_lora_of_the_replaced_projection_is_named(style):
    tensors = diffusers_naming() | {"transformer.proj_out.lora_A.weight": A, "transformer.proj_out.lora_B.weight": B}
    student = style(tensors)
    assert [s.key for s in student.styles[0].lora.skipped] == ["transformer.proj_out"]
    assert_adds(student, QUERY, B @ A)


def test_a_directory_with_one_file(tmp_path):
    make_style(tmp_path / "pytorch_lora_weights.safetensors", {f"transformer.{QUERY}": (64, 64)})
    student = golden_student("flux-tiny", [(Location(str(tmp_path)), 1.0)])
    assert list(student.styles[0].pairs["transformer"]) == [QUERY]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.safetensors", ("x.safetensors", 1.0)),
        ("x.safetensors:0.5", ("x.safetensors", 0.5)),
        ("owner/name:-1e-1", ("owner/name", -0.1)),
        ("a:b.safetensors:2", ("a:b.safetensors", 2.0)),
    ],
)
def test_parse(text, expected):
    assert parse_lora(text) == expected


def test_parse_a_path_with_a_colon(tmp_path):
    path = tmp_path / "v:2"
    path.mkdir()
    assert parse_lora(str(path)) == (str(path), 1.0)
    assert parse_lora(f"{path}:0.5") == (str(path), 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:strong", "--lora must be PATH or PATH:SCALE with a number for SCALE, got 'x:strong'"),
        ("x:", "--lora must be PATH or PATH:SCALE with a number for SCALE, got 'x:'"),
        ("x:nan", "--lora: SCALE must be a finite number, got 'nan'"),
        ("x:inf", "--lora: SCALE must be a finite number, got 'inf'"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_lora(text)


def put(key, *shape):
    return {key: torch.zeros(shape)}


QUERY_A = f"transformer.{QUERY}.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            diffusers_naming() | {QUERY_A: torch.zeros(2, 32)},
            f"LoRA style.safetensors, module 'transformer.{QUERY}': LoRA of transformer_blocks.0.attn.to_q must be "
            "A [r, 64] and B [64, r], got A [2, 32] and B [64, 2]; it was trained for another model",
        ),
        (
            {k.replace("blocks.0", "blocks.9"): v for k, v in diffusers_naming().items()},
            "LoRA style.safetensors, module 'transformer.transformer_blocks.9.attn.to_q': LoRA target "
            "'transformer_blocks.9.attn.to_q' does not exist in the base's transformer",
        ),
        (
            diffusers_naming() | put("transformer.x.dora_scale", 4),
            "LoRA: {p} is a DoRA (transformer.x.dora_scale), which is not supported; give a plain LoRA",
        ),
        (
            diffusers_naming() | put(f"transformer.{QUERY}.lora_magnitude_vector", 64),
            "LoRA: {p} is a DoRA (transformer." + QUERY + ".lora_magnitude_vector), "
            "which is not supported; give a plain LoRA",
        ),
        (
            kohya("lora_te2_encoder_block_0_layer_0_SelfAttention_q", A, B, 1.0),
            "LoRA style.safetensors, module 'lora_te2_encoder_block_0_layer_0_SelfAttention_q': LoRA of "
            "encoder.block.0.layer.0.SelfAttention.q must be A [r, 64] and B [32, r], got A [2, 64] and B [64, 2]; "
            "it was trained for another model",
        ),
        (
            kohya("lora_unet_double_blocks_9_img_attn_proj", A, B, 1.0),
            "LoRA style.safetensors, module 'lora_unet_double_blocks_9_img_attn_proj': LoRA target "
            "'transformer_blocks.9.attn.to_out.0' does not exist in the base's transformer",
        ),
        (
            {k: v for k, v in diffusers_naming().items() if k != QUERY_A},
            f"LoRA: {{p}}: transformer.{QUERY}.lora_B.weight has no lora_A; save the LoRA again",
        ),
    ],
    ids=["shape", "target", "dora", "peft dora", "kohya t5", "kohya target", "half"],
)
def test_errors(style, tensors, message):
    with pytest.raises(SourceError) as error:
        style(tensors)
    assert str(error.value) == message.replace("{p}", str(style.path))


def test_lora_for_the_other_family(style):
    with pytest.raises(SourceError) as error:
        style(kohya("lora_unet_double_blocks_0_img_attn_proj", A, B, 1.0), "qwen")
    assert str(error.value) == (
        f"LoRA: {style.path} is a LoRA for FLUX.1, the model is Qwen-Image; give a LoRA for this model"
    )


def test_a_merged_weight_beyond_float32(style):
    student = style({k: v * 1e19 for k, v in diffusers_naming().items()}, scale=1e5)
    with pytest.raises(SourceError) as error:
        list(student.source("backbone").blocks(f"{QUERY}.weight", torch.float32))
    assert str(error.value) == (
        f"tensor '{QUERY}.weight' is beyond float32's range after merging; use a smaller scale for the LoRAs"
    )


def test_integer_alpha_and_position_ids(style):
    tensors = kohya("lora_unet_double_blocks_0_img_attn_proj", A, B, 1) | {
        "text_encoder.text_model.embeddings.position_ids": torch.arange(77)
    }
    assert_adds(style(tensors), "transformer_blocks.0.attn.to_out.0", 0.5 * B @ A)


def test_adapter_config_beside_the_file(style):
    style.path.with_name("adapter_config.json").write_text('{"lora_alpha": 6}')
    assert_adds(style(diffusers_naming()), QUERY, 3 * B @ A)


def test_bytes_of_the_factors(style):
    qkv = torch.randn(192, 2, generator=torch.manual_seed(3))
    student = style(kohya("lora_unet_double_blocks_0_img_attn_qkv", A, qkv, 1.0))
    assert student.lora_bytes == 4 * (2 * 64 + 192 * 2)
    assert student.adapter_bytes - golden_student("flux-tiny").adapter_bytes == style.path.stat().st_size


def test_a_directory_with_two_files(tmp_path):
    for name in ("a", "b"):
        make_style(tmp_path / f"{name}-0000{name == 'b':d}.safetensors", {f"transformer.{QUERY}": (64, 64)})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a-00000.safetensors", "y": "b-00001.safetensors"}})
    )
    with pytest.raises(SourceError) as error:
        golden_student("flux-tiny", [(Location(str(tmp_path)), 1.0)])
    assert str(error.value) == f"LoRA: {tmp_path} must hold one .safetensors file, got 2 shards; join them"


def test_bad_metadata(style):
    write(diffusers_naming(), style.path, {"lora_adapter_metadata": "{"})
    with pytest.raises(SourceError) as error:
        golden_student("flux-tiny", [(Location(str(style.path)), 1.0)])
    assert str(error.value) == (
        f"LoRA: {style.path}: its metadata lora_adapter_metadata is not valid JSON "
        "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); save the LoRA again"
    )
