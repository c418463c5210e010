"""Base checkpoints: what their configs may leave out, and those that no bundle can be made of."""

from __future__ import annotations

import json
import shutil

import pytest

from arcflow_export.errors import SourceError
from arcflow_export.export.export import plan_export
from arcflow_export.options import ExportOptions
from tests.checkpoints import Sizes, make_adapter, make_base, open_student
from tests.conftest import golden_student


@pytest.fixture
def root(tmp_path):
    make_base(tmp_path / "base", Sizes())
    make_adapter(tmp_path / "adapter", Sizes())
    return tmp_path


def edit(path, **changes):
    """Change keys of a JSON file; `...` deletes the key."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def fails(root, message):
    with pytest.raises(SourceError) as error:
        plan_export(open_student(root), ExportOptions())
    assert str(error.value) == message.format(b=root / "base")


def test_flux_dev_has_no_axes_in_its_config(tmp_path):
    """FLUX.1-dev's transformer/config.json leaves out axes_dims_rope and out_channels; they are the class's."""
    sizes = Sizes(axes=(16, 56, 56), heads=1)
    make_base(tmp_path / "base", sizes)
    make_adapter(tmp_path / "adapter", sizes)
    for config in ("base/transformer", "adapter"):  # first the base's alone
        edit(tmp_path / config / "config.json", axes_dims_rope=..., out_channels=...)
        student = open_student(tmp_path)
        assert student.config["axes_dims_rope"] == [16, 56, 56]
        plan_export(student, ExportOptions())


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        (
            "transformer",
            {"axes_dims_rope": ...},
            "axes_dims_rope must add up to attention_head_dim 16, got [16, 56, 56]",
        ),
        ("transformer", {"num_layers": "2"}, "num_layers must be a positive integer, got '2'"),
        (
            "transformer",
            {"in_channels": 384},
            "in_channels must be 64, got 384; students of inpainting and control models are not supported",
        ),
    ],
)
def test_transformer_config(root, folder, changes, message):
    path = root / "base" / folder / "config.json"
    edit(path, **changes)
    fails(root, f"base checkpoint: {path}: {message}")


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        (
            "vae",
            {"_class_name": "AutoencoderDC"},
            "vae: _class_name must be 'AutoencoderKL' for a flux base, got 'AutoencoderDC'; give a base of this family",
        ),
        (
            "vae",
            {"latent_channels": 4},
            "vae: a flux base must have 16 latent channels and 4 levels (8 pixels per latent), got 4 and 4",
        ),
        (
            "text_encoder_2",
            {"architectures": ["UMT5EncoderModel"]},
            "text_encoder_2: {b}/text_encoder_2/config.json: architecture must be one of ('T5EncoderModel',), "
            "got 'UMT5EncoderModel'",
        ),
        (
            "text_encoder_2",
            {"d_ff": 32},
            "text_encoder_2: tensor 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight' must have shape [32, 32] "
            "by the config, got [64, 32]; config.json and weights disagree",
        ),
    ],
)
def test_other_configs(root, folder, changes, message):
    edit(root / "base" / folder / "config.json", **changes)
    fails(root, message)


def test_wrong_pipelines(root):
    edit(root / "base" / "model_index.json", _class_name="StableDiffusion3Pipeline")
    fails(
        root,
        "base checkpoint: {b}/model_index.json: _class_name must be one of ['FluxPipeline', 'QwenImagePipeline'], "
        "got 'StableDiffusion3Pipeline'",
    )
    (root / "base" / "model_index.json").unlink()
    fails(root, "base checkpoint: {b} has no model_index.json; give the directory of a whole diffusers pipeline")


def test_missing_component(root):
    shutil.rmtree(root / "base" / "vae")
    fails(root, "base checkpoint, vae: {b}/vae is not a directory")


def test_missing_tokenizer(root, tmp_path):
    from arcflow_export.checkpoint.tokenizer import export_tokenizer
    from arcflow_export.student.load import tokenizer_folders

    shutil.rmtree(root / "base" / "tokenizer_2")
    folder = tokenizer_folders(open_student(root))["tokenizer_2"]
    with pytest.raises(SourceError) as error:
        export_tokenizer(folder, tmp_path / "t.json", "tokenizer_2")
    assert str(error.value) == f"tokenizer_2: {folder} is missing; is the checkpoint complete?"


def test_qwen_flags_that_change_the_network(tmp_path):
    sizes = Sizes(family="qwen", text_dim=48)
    make_base(tmp_path / "base", sizes)
    make_adapter(tmp_path / "adapter", sizes)
    path = tmp_path / "base" / "transformer" / "config.json"
    edit(path, zero_cond_t=True)
    fails(tmp_path, f"base checkpoint: {path}: zero_cond_t is not supported; the base must be Qwen/Qwen-Image's")


def test_qwen_does_not_ship_its_conditioner():
    names = {"text_encoder", "backbone", "vae_decoder"}
    student = golden_student("qwen-tiny")
    assert {p.part.name for p in plan_export(student, ExportOptions()).parts} == names
    assert {p.part.name for p in plan_export(student, ExportOptions(keep_conditioner=True)).parts} == names | {
        "conditioner"
    }
