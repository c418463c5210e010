"""`arcflow lora inspect`: what it prints of a file, and which layers do not fit a bundle."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from fake_bundle import list_files, make_bundle, write_manifest
from safetensors.numpy import save_file

from arcflow_runtime import Bundle, cli
from tests.lora_files import KOHYA, PEFT, File

QUERY = "transformer_blocks.0.attn.to_q"


def lora(tmp_path, family="flux", metadata=None, **modules: tuple[int, int]):
    """A file with a module for each name in diffusers' naming, `__` for a dot, and its (out, in)."""
    tensors = {}
    for name, (out, inp) in modules.items():
        key = f"transformer.{name.replace('__', '.')}"
        tensors |= {key + PEFT[0]: torch.ones(4, inp), key + PEFT[1]: torch.ones(out, 4)}
    return str(File(family, tensors, metadata or {}).write(tmp_path))


def bundle(root, family="flux", baked=(), **weights: dict[str, tuple[int, int]]):
    """A bundle whose parts have these linears, [in, out]."""
    make_bundle(root, family, baked=baked)
    manifest = Bundle.open(root).manifest
    for part, shapes in weights.items():
        tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
        save_file(tensors, root / manifest.parts[part].weights)
    files = {name: entry for name, entry in list_files(root).items() if name in manifest.files}
    write_manifest(root, dataclasses.replace(manifest, files=files))
    return str(root)


def test_table(tmp_path, capsys):
    qkv = "lora_unet_double_blocks_{}_img_attn_qkv"
    tensors = {"text_encoder.text_model.embeddings.position_ids": torch.arange(77)}
    for i in range(2):
        tensors |= {qkv.format(i) + KOHYA[0]: torch.ones(4, 64), qkv.format(i) + KOHYA[1]: torch.ones(192, 4)}
        tensors[f"{qkv.format(i)}.alpha"] = torch.tensor(2.0)
    tensors |= {f"{QUERY.replace('to_q', 'to_out.0')}{end}": torch.ones(64, 64) for end in PEFT}
    path = File(tensors=tensors).write(tmp_path)
    assert cli.main(["lora", "inspect", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path}: flux, 7 linears from 9 tensors\n"
        "\n"
        "  part      linear                              in x out  rank  scale  from                          number\n"
        "  backbone  transformer_blocks.*.attn.to_k      64 x 64   4     0.5    alpha 2 (its own tensor) / 4  2\n"
        "  backbone  transformer_blocks.*.attn.to_out.0  64 x 64   64    1      no alpha stated               1\n"
        "  backbone  transformer_blocks.*.attn.to_q      64 x 64   4     0.5    alpha 2 (its own tensor) / 4  2\n"
        "  backbone  transformer_blocks.*.attn.to_v      64 x 64   4     0.5    alpha 2 (its own tensor) / 4  2\n"
        "\n"
        "not used\n"
        "  text_encoder.text_model.embeddings.position_ids: is a buffer that the model computes itself\n"
    )


def test_json(tmp_path, capsys):
    path = lora(tmp_path, metadata={"lora_alpha": "8"}, single_transformer_blocks__0__proj_mlp=(256, 64))
    assert cli.main(["lora", "inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "family": "flux",
        "tensors": 2,
        "layers": [
            {
                "part": "backbone",
                "linear": "single_transformer_blocks.0.proj_mlp",
                "module": "transformer.single_transformer_blocks.0.proj_mlp",
                "in": 64,
                "out": 256,
                "rank": 4,
                "file_rank": 4,
                "alpha": 8.0,
                "scale": 2.0,
                "source": "alpha 8 (lora_alpha in the metadata) / 4",
                "misfit": None,
            }
        ],
        "skipped": [],
    }


def test_a_file_for_several_models(tmp_path, capsys):
    path = lora(tmp_path, transformer_blocks__0__attn__to_q=(64, 64))
    assert cli.main(["lora", "inspect", path]) == 2
    assert capsys.readouterr().err == (
        f"arcflow lora: error: {path} can be for several models, whose linears have the same names; "
        "give --model flux or --model qwen\n"
    )
    assert cli.main(["lora", "inspect", path, "--model", "qwen"]) == 0
    assert f"{path}: qwen-image, 1 linears" in capsys.readouterr().out


def test_a_file_for_another_model(tmp_path, capsys):
    path = lora(tmp_path, down_blocks__0__attentions__0__to_q=(64, 64))
    assert cli.main(["lora", "inspect", path]) == 1
    assert capsys.readouterr().err == (
        f"arcflow lora: error: LoRA: {path} is a LoRA for Stable Diffusion, the model is FLUX.1; "
        "give a LoRA for this model\n"
    )


def test_a_bundle_that_it_fits(tmp_path, capsys):
    root = bundle(tmp_path / "b", backbone={QUERY: (64, 64)})
    path = lora(tmp_path, transformer_blocks__0__attn__to_q=(64, 64))
    assert cli.main(["lora", "inspect", path, "--bundle", root]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_a_bundle_that_it_does_not_fit(tmp_path, capsys):
    root = bundle(tmp_path / "b", backbone={QUERY: (32, 64)})
    path = lora(tmp_path, transformer_blocks__0__attn__to_q=(64, 64), transformer_blocks__7__attn__to_q=(64, 64))
    assert cli.main(["lora", "inspect", path, "--bundle", root]) == 1
    assert capsys.readouterr().out.endswith(
        "\n\ndoes not fit the bundle\n"
        f"  backbone, {QUERY}: the linear is [32, 64], the LoRA's [64, 64]: it is for another model\n"
        "  backbone, transformer_blocks.7.attn.to_q: the bundle's backbone has no such linear\n"
    )


def test_what_a_bundle_has_no_linear_for(tmp_path, capsys):
    root = bundle(tmp_path / "b", "qwen-image", (2,), backbone={QUERY: (64, 64)})
    path = lora(tmp_path, "qwen-image", transformer_blocks__0__txt_mlp__net__2=(64, 256))
    assert cli.main(["lora", "inspect", path, "--bundle", root]) == 0
    assert capsys.readouterr().out.endswith(
        "\n\nnot used\n  backbone, transformer_blocks.0.txt_mlp.net.2: "
        "the model does not use its result, so it changes nothing\n"
    )
    path = lora(tmp_path, "qwen-image", transformer_blocks__0__img_mod__1=(384, 64))
    assert cli.main(["lora", "inspect", path, "--bundle", root]) == 1
    assert "img_mod.1: the bundle has no conditioner: its results are stored as a table\n" in capsys.readouterr().out


def test_clip_with_another_prefix(tmp_path, capsys):
    root = bundle(tmp_path / "b", text_encoder={"encoder.layers.0.mlp.fc1": (32, 64)})
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    path = File(tensors={key + KOHYA[0]: torch.ones(4, 32), key + KOHYA[1]: torch.ones(64, 4)}).write(tmp_path)
    assert cli.main(["lora", "inspect", str(path), "--bundle", root]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_model_and_bundle_exclude_each_other(tmp_path, capsys):
    assert cli.main(["lora", "inspect", "x", "--model", "flux", "--bundle", str(tmp_path)]) == 2
    assert "argument --bundle: not allowed with argument --model" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["show", "x"]])
def test_wrong_arguments(arguments, capsys):
    assert cli.main(["lora", *arguments]) == 2
    assert "arcflow lora: error: " in capsys.readouterr().err
