"""The ways a safetensors checkpoint can be bad, each with its own message."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.errors import SourceError


@pytest.fixture
def shards(tmp_path):
    """Two shards and their index."""
    save_file({"a": torch.arange(12.0).view(4, 3)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "m-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def fails(path, message):
    with pytest.raises(SourceError) as error:
        TensorIndex.open(path, "vae")
    assert str(error.value) == message.format(p=path)


def test_shards_are_one_index(shards):
    index = TensorIndex.open(shards, "vae")
    assert sorted(index) == ["a", "b"]
    assert len(index) == 2
    assert "c" not in index
    a, b = index["a"], index["b"]
    assert (a.shape, a.dtype, a.numel, a.num_bytes) == ((4, 3), torch.float32, 12, 48)
    assert (b.shape, b.dtype, b.num_bytes) == ((2,), torch.bfloat16, 4)
    assert torch.equal(a.read(), torch.arange(12.0).view(4, 3))
    assert [len(rows) for rows in a.rows([(0, 1), (1, 4)])] == [1, 3]
    assert torch.equal(next(a.rows([(1, 3)])), torch.arange(3.0, 9.0).view(2, 3))


def test_a_tensor_that_is_not_there(shards):
    with pytest.raises(SourceError) as error:
        TensorIndex.open(shards, "vae")["c"]
    assert str(error.value) == f"{shards} has no tensor 'c'; is the checkpoint complete?"


def test_missing_shard(shards):
    (shards / "m-2.safetensors").unlink()
    fails(shards, "vae: {p}/m-2.safetensors is missing, but m.safetensors.index.json lists it")


def test_index_that_leaves_its_directory(shards):
    (shards / "m.safetensors.index.json").write_text('{"weight_map": {"a": "../m-1.safetensors"}}')
    fails(shards, "vae: {p}/m.safetensors.index.json names '../m-1.safetensors', which is outside its directory")


def test_index_without_a_map(shards):
    (shards / "m.safetensors.index.json").write_text('{"weight_map": {}}')
    fails(shards, "vae: {p}/m.safetensors.index.json has no 'weight_map'; download it again")


def test_no_directory_and_no_file(tmp_path):
    fails(tmp_path / "none", "vae: {p} is not a directory")
    fails(tmp_path, "vae: {p} holds no .safetensors file")


def test_only_pickles(tmp_path):
    for name in ("pytorch_model.bin", "model.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    fails(
        tmp_path,
        "vae: {p} holds only pickles (model.ckpt, pytorch_model.bin), which can run code when read; "
        "convert them to safetensors first",
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_by_another_name(tmp_path, protocol):
    import pickle

    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"weights": [1.0] * 9}, protocol))
    fails(path, "vae: {p} is a pickle by its content; convert it to safetensors")


def test_a_torch_file_by_another_name(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save({"w": torch.ones(2)}, path)
    fails(path, "vae: {p} is a pickle by its content; convert it to safetensors")


def test_a_pickle_by_its_name(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"anything at all")
    fails(path, "vae: {p} is a pickle, which can run code when read; convert it to safetensors")


def test_truncated(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(64)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    fails(
        path,
        "vae: {p} is not a valid safetensors file (Error while deserializing header: incomplete metadata, "
        "file not fully covered); download it again",
    )
    path.write_bytes(whole[:5])
    fails(path, "vae: {p} has only 5 bytes; it is truncated, download it again")
    path.write_bytes(b"")
    fails(path, "vae: {p} has only 0 bytes; it is truncated, download it again")


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails(path, "vae: {p} is a Git LFS pointer, not the weights; run `git lfs pull`")


def test_quantised(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    fails(
        path,
        "vae: {p}: tensor 'w' has dtype F8_E4M3; supported are ['BF16', 'F16', 'F32', 'F64']. "
        "Use the original, unquantised checkpoint",
    )


def test_variants(tmp_path):
    """diffusers' variants lie beside the plain file, which is the one to use."""
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert TensorIndex.open(tmp_path, "vae")["w"].read() == 0
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    fails(
        tmp_path,
        "vae: {p} holds ['model.fp16.safetensors', 'model.safetensors', 'other.safetensors'] and no index; "
        "give a folder with one of them",
    )


def test_digest_tells_files_apart(tmp_path):
    digests = set()
    contents = [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}, {"w": torch.zeros(3)}, {"w": torch.ones(2)}]
    for i, tensors in enumerate(contents):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        (tmp_path / "model.safetensors").write_bytes((tmp_path / f"{i}.safetensors").read_bytes())
        digests.add(TensorIndex.open(tmp_path / "model.safetensors", "vae").digest())
    assert len(digests) == len(contents)


def test_digest_samples_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr("arcflow_export.checkpoint.tensors._SAMPLES", 4)
    monkeypatch.setattr("arcflow_export.checkpoint.tensors._SAMPLE_BYTES", 16)
    digests = []
    for value in (0.0, 1.0):
        save_file({"w": torch.full((1000,), value)}, tmp_path / "model.safetensors")
        digests.append(TensorIndex.open(tmp_path / "model.safetensors", "vae").digest())
    assert digests[0] != digests[1]


def index_of(folder, name, shard, value):
    save_file({"w": torch.full((1,), value)}, folder / shard)
    (folder / name).write_text(json.dumps({"weight_map": {"w": shard}}))


@pytest.mark.parametrize(
    "variant", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json", "model.a.safetensors"]
)
def test_of_several_indexes_the_plain_one_is_read(tmp_path, variant):
    """A variant's index comes first by name."""
    index_of(tmp_path, "model.safetensors.index.json", "model-00001-of-00001.safetensors", 1.0)
    index_of(tmp_path, variant, "model.fp16-00001-of-00001.safetensors", 2.0)
    assert TensorIndex.open(tmp_path, "vae")["w"].read() == 1
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    assert TensorIndex.open(tmp_path, "vae")["w"].read() == 1


@pytest.mark.parametrize("name", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards_of_a_variant_alone(tmp_path, name):
    index_of(tmp_path, name, "model.fp16-00001-of-00002.safetensors", 2.0)
    save_file({"v": torch.ones(1)}, tmp_path / "model.fp16-00002-of-00002.safetensors")
    fails(
        tmp_path,
        f"vae: {{p}} holds the weights only as the variant 'fp16' ({name}); "
        "give a checkpoint that was saved without a variant",
    )


def test_two_plain_indexes(shards):
    (shards / "n.safetensors.index.json").write_text("{}")
    fails(
        shards,
        "vae: {p} holds ['m.safetensors.index.json', 'n.safetensors.index.json']; give a folder with one of them",
    )


def test_link_to_a_missing_file(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../../blobs/c0ffee")
    fails(
        tmp_path,
        "vae: {p}/model.safetensors is a link to ../../blobs/c0ffee, which is missing; "
        "give the hub id without --offline to download it again",
    )


def test_a_file_larger_than_the_memory(tmp_path):
    """The file is a hole, so that it takes no space; Linux refuses to map so much for writing."""
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4000
    entry = {"dtype": "F32", "shape": [rows, 1000], "data_offsets": [0, 4000 * rows]}
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "a.safetensors"
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + 4000 * rows)
    first, last = TensorIndex.open(path, "part")["a"].rows([(0, 2), (rows - 1, rows)])
    assert first.shape == (2, 1000) and last.shape == (1, 1000) and not first.any()
