"""Directories and hub ids: what is wanted of each kind of checkpoint, and what is said of a name that is neither.

`test_hub` has what is said when the hub refuses or breaks off.
"""

from __future__ import annotations

import json
import time

import huggingface_hub
import pytest

from arcflow_export.checkpoint.layout import adapter_files, base_files, lora_files
from arcflow_export.checkpoint.sources import Listing, Location, check_present, measure, read_json, resolve
from arcflow_export.errors import SourceError
from arcflow_export.families import facts

FLUX = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
#: What lies beside them in FLUX.1-dev's repository.
BESIDE = [".gitattributes", "LICENSE.md", "README.md", "ae.safetensors", "dev_grid.jpg", "flux1-dev.safetensors"]
QWEN = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/generation_config.json",
    *(f"text_encoder/model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
    "text_encoder/model.safetensors.index.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "transformer/config.json",
    *(f"transformer/diffusion_pytorch_model-0000{i}-of-00009.safetensors" for i in range(1, 10)),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture
def listing(tmp_path):
    """A function (names, pipeline, what) -> listing of a repository whose indexes list the shards beside them."""

    def make(names, pipeline="FluxPipeline", what="base checkpoint"):
        def read(name):
            folder = name.rpartition("/")[0]
            shards = [n.removeprefix(f"{folder}/") for n in names if n.startswith(f"{folder}/") and "-of-" in n]
            index = {"_class_name": pipeline, "weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
            path = tmp_path / name.replace("/", "-")
            path.write_text(json.dumps(index))
            return path

        return Listing(what, "owner/name", frozenset(names), read)

    return make


def refused(choose, listing):
    with pytest.raises(SourceError) as error:
        choose(listing)
    return str(error.value)


def fails(message, *arguments, **options):
    for find in (resolve, measure):
        with pytest.raises(SourceError) as error:
            find(Location(*arguments, **options), "adapter", adapter_files)
        assert str(error.value) == message


def test_of_flux_every_stage_gets_its_files_and_nothing_else_is_fetched(listing):
    assert sorted(base_files(listing([*FLUX, *BESIDE]))) == FLUX


def test_of_qwen_image_likewise(listing):
    names = [*QWEN, "README.md", "tokenizer/chat_template.jinja"]
    assert sorted(base_files(listing(names, "QwenImagePipeline"))) == QWEN


@pytest.mark.parametrize(
    "copy",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors.index.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/openvino_model.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "vae/sub/diffusion_pytorch_model.safetensors",
    ],
)
def test_weights_are_fetched_once(listing, copy):
    assert sorted(base_files(listing([*FLUX, copy]))) == FLUX


def test_every_folder_of_the_table_is_fetched():
    """A folder that is added to the table must be in the lists above too."""
    for family, names in (("flux", FLUX), ("qwen-image", QWEN)):
        assert {f.name for f in facts(family).folders} == {n.split("/")[0] for n in names if "/" in n}


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ([], "holds no diffusion_pytorch_model.safetensors"),
        (["ae.safetensors"], "holds no diffusion_pytorch_model.safetensors"),
        (
            ["diffusion_pytorch_model.fp16.safetensors"],
            "holds the weights only as the variant 'fp16' (diffusion_pytorch_model.fp16.safetensors); "
            "give a checkpoint that was saved without a variant",
        ),
        (
            ["diffusion_pytorch_model.bin"],
            "holds only pickles (diffusion_pytorch_model.bin), which can run code when read; "
            "convert them to safetensors first",
        ),
    ],
)
def test_a_base_without_usable_weights_is_refused_before_anything_large_is_fetched(listing, replaced, message):
    names = [*(n for n in FLUX if n != "vae/diffusion_pytorch_model.safetensors"), *(f"vae/{n}" for n in replaced)]
    assert refused(base_files, listing(names)) == f"base checkpoint: owner/name/vae {message}"


def test_a_base_that_is_no_supported_pipeline(listing, tmp_path):
    assert refused(base_files, listing(FLUX[1:])) == (
        "base checkpoint: owner/name has no model_index.json; give the directory of a whole diffusers pipeline"
    )
    assert refused(base_files, listing(FLUX, "SanaPipeline")) == (
        f"base checkpoint: {tmp_path / 'model_index.json'}: _class_name must be one of "
        "['FluxPipeline', 'QwenImagePipeline'], got 'SanaPipeline'"
    )


def test_adapter(listing):
    names = ["config.json", "diffusion_pytorch_model.safetensors", "README.md", "other/config.json", "other/x.bin"]
    assert adapter_files(listing(names)) == names[:2]
    assert refused(adapter_files, listing(["README.md", "b/config.json", "a/config.json"], what="adapter")) == (
        "adapter: owner/name has no config.json; give --adapter-subfolder, one of a, b"
    )
    assert refused(adapter_files, listing(["README.md"], what="adapter")) == (
        "adapter: owner/name has no config.json; is this an ArcFlow adapter?"
    )


def test_lora(listing):
    assert lora_files(listing(["README.md", "style.v1.safetensors", "old/x.safetensors"])) == ["style.v1.safetensors"]
    peft = ["adapter_model.safetensors", "adapter_config.json"]
    assert lora_files(listing(["README.md", *peft])) == peft
    assert refused(lora_files, listing(["a.safetensors", "b.safetensors"], what="LoRA")) == (
        "LoRA: owner/name holds ['a.safetensors', 'b.safetensors'] and no index; give a folder with one of them"
    )
    assert refused(lora_files, listing(["a.bin"], what="LoRA")) == (
        "LoRA: owner/name holds only pickles (a.bin), which can run code when read; convert them to safetensors first"
    )


def test_directory(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    found = resolve(Location(str(tmp_path / "a")), "adapter", adapter_files)
    assert (found.name, found.path, found.revision) == ("a", tmp_path / "a", None)
    sub = Location(str(tmp_path / "a"), "sub")
    assert resolve(sub, "adapter", adapter_files).path == tmp_path / "a" / "sub"
    assert measure(sub, "adapter", adapter_files).bytes == 0
    fails(f"adapter: {tmp_path / 'a'} has no subfolder 'bus'", str(tmp_path / "a"), "bus")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "owner/na me", "a/b/c", "loras/missing.safetensors", "-a/b"])
def test_names_that_are_no_hub_ids(name):
    fails(
        f"adapter: {name!r} is not a file or directory here, nor a hub id of the form 'owner/name'; check the spelling",
        name,
    )


def test_empty_name():
    fails("adapter: the name is empty; give a directory or a hub id of the form 'owner/name'", "")


def test_real_client_without_a_network_gives_up_soon(tmp_path, monkeypatch):
    """The client's own retries must not keep a user waiting for minutes; port 9 refuses at once."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    fails(
        "adapter: 'owner/name' is not a directory here and the hub cannot be reached "
        "([Errno 111] Connection refused); check the path or the network",
        "owner/name",
    )
    assert time.monotonic() - started < 30


def test_link_to_a_missing_file(tmp_path):
    """As in a hub's cache whose blobs were removed by hand."""
    path = tmp_path / "config.json"
    path.symlink_to("../blobs/c0ffee")
    with pytest.raises(SourceError) as error:
        check_present(path, "vae")
    assert str(error.value) == (
        f"vae: {path} is a link to ../blobs/c0ffee, which is missing; "
        "give the hub id without --offline to download it again"
    )


def test_json(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (
        ("[]", "must hold a JSON object, got list"),
        ("{,}", "is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ):
        path.write_text(text)
        with pytest.raises(SourceError) as error:
            read_json(path, "vae")
        assert str(error.value) == f"vae: {path} {message}"
    path.unlink()
    with pytest.raises(SourceError) as error:
        read_json(path, "vae")
    assert str(error.value) == f"vae: {path} is missing"
