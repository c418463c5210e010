"""Adapters that do not fit: what is wrong, where, and what was expected."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from arcflow_export.checkpoint.sources import Location
from arcflow_export.errors import SourceError
from arcflow_export.student.load import load_student
from tests.checkpoints import ADAPTER_FILE, Sizes, make_student, open_student, write_adapter
from tests.conftest import GOLDEN, golden_student


@pytest.fixture
def root(tmp_path):
    """A copy of the golden FLUX base (linked) and adapter."""
    (tmp_path / "base").symlink_to(GOLDEN / "flux-tiny" / "base")
    shutil.copytree(GOLDEN / "flux-tiny" / "adapter", tmp_path / "adapter")
    return tmp_path


def edit_config(root, **changes):
    path = root / "adapter" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(root, change):
    tensors = load_file(root / "adapter" / ADAPTER_FILE)
    change(tensors)
    write_adapter(root / "adapter", tensors)


def fails(root, message):
    with pytest.raises(SourceError) as error:
        open_student(root)
    assert str(error.value) == message.format(a=root / "adapter", b=root / "base")


@pytest.mark.parametrize(("name", "pairs", "full"), [("flux-tiny", 16, 8), ("qwen-tiny", 12, 8)])
def test_golden(name, pairs, full):
    adapter = golden_student(name).adapter
    assert (len(adapter.loras), len(adapter.full)) == (pairs, full)
    assert (adapter.num_gaussians, adapter.logweights_channels) == (16, 4)
    assert all(pair.scale == 1 for pair in adapter.loras.values())
    assert adapter.parameters == sum(t.numel() for t in load_file(GOLDEN / name / "adapter" / ADAPTER_FILE).values())


def test_prefix_makes_no_difference(tmp_path):
    plain = make_student(tmp_path / "plain", Sizes()).adapter
    prefixed = make_student(tmp_path / "prefixed", Sizes(prefix="transformer.")).adapter
    assert plain.full.keys() == prefixed.full.keys()
    assert plain.loras.keys() == prefixed.loras.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "FluxTransformer2DModel"},
            "adapter: {a}/config.json: _class_name must be one of ['ArcFluxTransformer2DModel', "
            "'ArcQwenImageTransformer2DModel'], got 'FluxTransformer2DModel'; is this an ArcFlow adapter?",
        ),
        (
            {"_class_name": "ArcQwenImageTransformer2DModel"},
            "adapter: ArcQwenImageTransformer2DModel needs a base of class QwenImageTransformer2DModel, "
            "but the base is 'FluxTransformer2DModel'",
        ),
        (
            {"num_layers": 19},
            "adapter: num_layers is 19 in the adapter and 2 in the base; the adapter was trained for another model",
        ),
        (
            {"guidance_embeds": False},
            "adapter: guidance_embeds is False in the adapter and True in the base; "
            "the adapter was trained for another model",
        ),
        ({"num_gaussians": 0}, "adapter: {a}/config.json: num_gaussians must be a positive integer, got 0"),
        ({"num_gaussians": None}, "adapter: {a}/config.json: num_gaussians must be a positive integer, got None"),
        (
            {"num_gaussians": 8},
            "adapter: proj_out_means.weight must have shape [512, 64] for num_gaussians K=8 and "
            "logweights_channels P=4, got [1024, 64]; config.json and weights disagree",
        ),
        (
            {"logweights_channels": 1},
            "adapter: {a}/config.json: logweights_channels must be 4, one per sub-pixel of a packed token, got 1",
        ),
    ],
)
def test_config(root, changes, message):
    edit_config(root, **changes)
    fails(root, message)


def test_no_config(root):
    (root / "adapter" / "config.json").unlink()
    fails(root, "adapter: {a}/config.json is missing")
    (root / "adapter" / "config.json").write_text("{")
    fails(
        root,
        "adapter: {a}/config.json is not valid JSON "
        "(Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    )


def test_a_file_is_no_adapter(root):
    file = GOLDEN / "flux-tiny" / "adapter" / ADAPTER_FILE
    with pytest.raises(SourceError) as error:
        load_student(Location(str(root / "base")), Location(str(file)), [])
    assert str(error.value) == f"adapter: {file} must be a directory with config.json and one .safetensors file"


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def put(key, *shape):
    return lambda tensors: tensors.__setitem__(key, torch.zeros(shape))


PROJ = "single_transformer_blocks.0.proj_mlp"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("proj_out_loggamma.weight"),
            "adapter: {a} has no 'proj_out_loggamma.weight'; is this an ArcFlow adapter?",
        ),
        (
            lambda tensors: tensors.pop(f"{PROJ}.lora_B.weight"),
            f"adapter: {PROJ} has no lora_B; is the adapter complete?",
        ),
        (
            put("a.lora.down.weight", 1),
            "adapter: {a}: LoRA key 'a.lora.down.weight' must be '<module>.lora_A.weight' or '<module>.lora_B.weight'; "
            "is this an ArcFlow adapter?",
        ),
        (
            put("nothing.bias", 1),
            "adapter: {a}: key 'nothing.bias' does not exist in the base transformer; "
            "the adapter was trained for another model",
        ),
        (
            put("proj_out_means.scale", 1),
            "adapter: {a}: key 'proj_out_means.scale' does not exist in the base transformer; "
            "the adapter was trained for another model",
        ),
        (put("proj_out.bias", 64), "adapter: {a}: key 'proj_out.bias' belongs to a layer that the three heads replace"),
        (
            put("norm_out.linear.bias", 64),
            "adapter: norm_out.linear.bias has shape [64], the base's is [128]; "
            "the adapter was trained for another model",
        ),
        (
            put("transformer.norm_out.linear.bias", 128),
            "adapter: {a} has 'norm_out.linear.bias' twice, with and without the prefix 'transformer.'; remove one",
        ),
        (
            put(f"{PROJ}.lora_A.weight", 8, 32),
            f"adapter: LoRA of {PROJ} must be A [r, 64] and B [256, r], got A [8, 32] and B [256, 8]; "
            "it was trained for another model",
        ),
        (
            rename(f"{PROJ}.lora_A.weight", f"{PROJ}.lora_C.weight"),
            "adapter: {a}: LoRA key '" + PROJ + ".lora_C.weight' must be "
            "'<module>.lora_A.weight' or '<module>.lora_B.weight'; is this an ArcFlow adapter?",
        ),
    ],
)
def test_tensors(root, change, message):
    edit_tensors(root, change)
    fails(root, message)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nowhere.linear", "adapter: LoRA target 'nowhere.linear' does not exist in the base's transformer"),
        (
            "transformer_blocks.0.attn.norm_q",
            "adapter: LoRA target 'transformer_blocks.0.attn.norm_q' of the base's transformer is not a linear layer",
        ),
        ("proj_out", "adapter: {a}: LoRA of 'proj_out' must not exist; the heads are full tensors"),
        ("proj_out_means", "adapter: {a}: LoRA of 'proj_out_means' must not exist; the heads are full tensors"),
    ],
)
def test_lora_of_what_is_no_linear_of_the_base(root, module, message):
    def add(tensors):
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = torch.zeros(2, 64), torch.zeros(64, 2)

    edit_tensors(root, add)
    fails(root, message)


def test_the_other_family(root):
    with pytest.raises(SourceError) as error:
        load_student(Location(str(root / "base")), Location(str(GOLDEN / "qwen-tiny" / "adapter")), [])
    assert str(error.value) == (
        "adapter: ArcQwenImageTransformer2DModel needs a base of class QwenImageTransformer2DModel, "
        "but the base is 'FluxTransformer2DModel'"
    )


def test_another_size(tmp_path, root):
    make_student(tmp_path / "other", Sizes())
    with pytest.raises(SourceError) as error:
        load_student(Location(str(root / "base")), Location(str(tmp_path / "other" / "adapter")), [])
    assert str(error.value) == (
        "adapter: num_layers is 1 in the adapter and 2 in the base; the adapter was trained for another model"
    )
