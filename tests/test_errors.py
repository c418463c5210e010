"""Every way a run can fail, through the command: the exact message, the exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file

import arcflow_export.export.export
from arcflow_export.errors import SourceError
from arcflow_runtime import cli
from tests.announced import after_announcement
from tests.checkpoints import Sizes, make_adapter, make_base, write_adapter
from tests.conftest import GOLDEN

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Read first of all weights, when Qwen's modulation is baked.
FIRST = "time_text_embed.timestep_embedder.linear_1.weight"


class Workplace:
    """A copy of a golden checkpoint to damage, and a directory to export into."""

    def __init__(self, root, family):
        self.base, self.adapter, self.outside = root / "base", root / "adapter", root / "outside"
        shutil.copytree(GOLDEN / family / "base", self.base)
        shutil.copytree(GOLDEN / family / "adapter", self.adapter)
        self.outside.mkdir()
        self.transformer = self.base / "transformer" / WEIGHTS

    def edit(self, file, change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def fails(self, capsys, message, *options):
        sources = ["--base", str(self.base), "--adapter", str(self.adapter)]
        out = self.outside / "bundle"
        assert cli.main(["export", *sources, "--out", str(out), *options]) == 1
        captured = capsys.readouterr()
        places = {"a": self.adapter, "b": self.base, "o": self.outside}
        assert after_announcement(captured.err) == f"arcflow export: error: {message.format(**places)}\n"
        assert os.listdir(self.outside) == []


@pytest.fixture
def flux(tmp_path):
    return Workplace(tmp_path, "flux-tiny")


@pytest.fixture
def qwen(tmp_path):
    return Workplace(tmp_path, "qwen-tiny")


def test_truncated_safetensors(flux, capsys):
    flux.transformer.write_bytes(flux.transformer.read_bytes()[:-7])
    flux.fails(
        capsys,
        "base checkpoint, transformer: {b}/transformer/" + WEIGHTS + " is not a valid safetensors file "
        "(Error while deserializing header: incomplete metadata, file not fully covered); download it again",
    )


def test_truncated_adapter(flux, capsys):
    (flux.adapter / WEIGHTS).write_bytes(b"")
    flux.fails(capsys, "adapter: {a}/" + WEIGHTS + " has only 0 bytes; it is truncated, download it again")


def test_missing_safetensors(flux, capsys):
    (flux.adapter / WEIGHTS).unlink()
    flux.fails(capsys, "adapter: {a} holds no .safetensors file")


def test_missing_shard(tmp_path, capsys):
    place = Workplace(tmp_path, "flux-tiny")
    shutil.rmtree(place.base)
    shutil.rmtree(place.adapter)
    make_base(place.base, Sizes(max_shard_size="60KB"))
    make_adapter(place.adapter, Sizes())
    shard = sorted((place.base / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    place.fails(
        capsys,
        f"base checkpoint, transformer: {shard} is missing, but {WEIGHTS}.index.json lists it",
    )


def test_missing_tensor(flux, capsys):
    flux.edit(flux.transformer, lambda tensors: tensors.pop("x_embedder.bias"))
    flux.fails(capsys, "{b}/transformer has no tensor 'x_embedder.bias'; is the checkpoint complete?")


def test_renamed_pickle(flux, capsys):
    flux.transformer.write_bytes(pickle.dumps({"w": [1.0]}))
    flux.fails(
        capsys,
        "base checkpoint, transformer: {b}/transformer/" + WEIGHTS + " is a pickle by its content; "
        "convert it to safetensors",
    )


def test_only_a_pickle(flux, capsys):
    (flux.adapter / WEIGHTS).rename(flux.adapter / "diffusion_pytorch_model.bin")
    flux.fails(
        capsys,
        "adapter: {a} holds only pickles (diffusion_pytorch_model.bin), which can run code when read; "
        "convert them to safetensors first",
    )


def test_adapter_of_the_other_family(flux, capsys):
    flux.adapter = GOLDEN / "qwen-tiny" / "adapter"
    flux.fails(
        capsys,
        "adapter: ArcQwenImageTransformer2DModel needs a base of class QwenImageTransformer2DModel, "
        "but the base is 'FluxTransformer2DModel'",
    )


def test_adapter_of_another_size(flux, tmp_path, capsys):
    flux.adapter = make_adapter(tmp_path / "other", Sizes(heads=3, axes=(8, 12, 12), layers=2, single_layers=3))
    flux.fails(
        capsys,
        "adapter: num_attention_heads is 3 in the adapter and 2 in the base; the adapter was trained for another model",
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "num_gaussians",
            15,
            "adapter: proj_out_means.weight must have shape [960, 64] for num_gaussians K=15 and "
            "logweights_channels P=4, got [1024, 64]; config.json and weights disagree",
        ),
        (
            "logweights_channels",
            16,
            "adapter: {a}/config.json: logweights_channels must be 4, one per sub-pixel of a packed token, got 16",
        ),
    ],
)
def test_k_and_p_that_disagree(flux, capsys, key, value, message):
    path = flux.adapter / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    flux.fails(capsys, message)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_inf_in_the_base(qwen, capsys, value):
    qwen.edit(qwen.transformer, lambda tensors: tensors[FIRST][0].fill_(value))
    qwen.fails(
        capsys,
        "{b}/transformer/" + WEIGHTS + f": tensor '{FIRST}' holds 256 NaN or Inf values; "
        "the file is damaged or the training diverged",
    )


def test_nan_in_the_adapter(qwen, capsys):
    tensors = load_file(qwen.adapter / WEIGHTS)
    [key] = [k for k in tensors if k.endswith("timestep_embedder.linear_1.lora_B.weight")]
    tensors[key][3, 1] = float("nan")
    write_adapter(qwen.adapter, tensors)
    qwen.fails(
        capsys,
        "{a}/" + WEIGHTS + f": tensor '{key}' holds 1 NaN or Inf values; the file is damaged or the training diverged",
    )


def test_float16_overflow(qwen, capsys):
    qwen.edit(qwen.transformer, lambda tensors: tensors[FIRST][0, 0].fill_(1e6))
    qwen.fails(
        capsys,
        f"tensor '{FIRST}' has the value 1e+06, beyond float16's 65504; export with --dtype bfloat16 or float32",
        "--dtype",
        "float16",
    )


def test_float16_overflow_that_only_the_merge_makes(qwen, capsys):
    tensors = load_file(qwen.adapter / WEIGHTS)
    for factor in ("lora_A", "lora_B"):
        [key] = [k for k in tensors if k.endswith(f"timestep_embedder.linear_1.{factor}.weight")]
        tensors[key].zero_()[0, 0] = 300.0
    write_adapter(qwen.adapter, tensors)
    qwen.edit(qwen.transformer, lambda base: base[FIRST].zero_())
    qwen.fails(
        capsys,
        f"tensor '{FIRST}' has the value 90000, beyond float16's 65504; export with --dtype bfloat16 or float32",
        "--dtype",
        "float16",
    )


def test_full_disk(qwen, capsys, monkeypatch):
    def fill(plan, folder, files, progress):
        (folder / "modulation.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arcflow_export.export.export, "_bake", fill)
    qwen.fails(capsys, "the disk of {o} is full; nothing was left behind")


def test_interrupt(qwen, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(arcflow_export.export.export, "_bake", interrupt)
    out = str(qwen.outside / "bundle")
    assert cli.main(["export", "--base", str(qwen.base), "--adapter", str(qwen.adapter), "--out", out]) == 130
    assert after_announcement(capsys.readouterr().err) == "arcflow export: interrupted\n"
    assert os.listdir(qwen.outside) == []


def test_a_stage_that_fails_names_itself(qwen, capsys, monkeypatch):
    def convert(part, opset):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("arcflow_export.graph.trace._convert", convert)
    qwen.fails(capsys, "text_encoder: conversion to ONNX failed: RuntimeError: no such operator")


def generate(bundle, *options):
    return cli.main(["generate", str(bundle), "a prompt", "--height", "32", "--width", "32", *options])


def test_steps_that_are_not_baked(bundles, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(bundles("qwen-tiny", opset=23, steps=(2, 4)), "--steps", "3") == 2
    assert capsys.readouterr().err == (
        "arcflow generate: error: num_inference_steps must be one of those baked into this bundle, [2, 4], got 3; "
        "export with --steps 3, or with --keep-conditioner for any step count\n"
    )
    assert os.listdir() == []


def test_sizes_out_of_the_bundles_range(bundles, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle = bundles("qwen-tiny", opset=23, steps=(2, 4))
    assert generate(bundle, "--height", "2064") == 2
    assert generate(bundle, "--width", "100") == 2
    assert capsys.readouterr().err == (
        "arcflow generate: error: height must be between 16 and 2048 for this bundle, got 2064; "
        "export a bundle with a wider range or choose another size\n"
        "arcflow generate: error: width must be a multiple of 16, got 100; the nearest is 96\n"
    )
    assert os.listdir() == []


@pytest.mark.parametrize("file", ["backbone.safetensors", "backbone.onnx", "tokenizer.json", "modulation.safetensors"])
def test_edited_bundle(bundles, capsys, tmp_path, file):
    bundle = shutil.copytree(bundles("qwen-tiny", opset=23, steps=(2, 4)), tmp_path / "bundle")
    data = bytearray((bundle / file).read_bytes())
    data[-1] ^= 1
    (bundle / file).write_bytes(data)
    assert generate(bundle) == 1
    assert capsys.readouterr().err == (
        f"arcflow generate: error: {bundle / file} does not match its SHA-256 in manifest.json; "
        "it was edited or damaged, export or copy it again\n"
    )


def test_moved_bundle_draws_and_a_part_of_it_does_not(bundles, capsys, tmp_path):
    bundle = shutil.copytree(bundles("qwen-tiny", opset=23, steps=(2, 4)), tmp_path / "elsewhere" / "bundle")
    assert generate(bundle, "--out", str(tmp_path / "x.png")) == 0
    (bundle / "vae_decoder.safetensors").unlink()
    capsys.readouterr()
    assert generate(bundle, "--out", str(tmp_path / "y.png")) == 1
    assert capsys.readouterr().err == (
        f"arcflow generate: error: {bundle}/vae_decoder.safetensors is missing; was the bundle moved in part? "
        "Copy the whole directory again\n"
    )
    assert not (tmp_path / "y.png").exists()


def test_bfloat16_on_an_engine_that_cannot_run_it(command_run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert generate(command_run.bundle) == 1
    assert capsys.readouterr().err == (
        "arcflow generate: error: text_encoder is in bfloat16, which ONNX Runtime cannot run on a CPU; "
        "export the bundle with --dtype float32\n"
    )
    assert os.listdir() == []


def test_debug_shows_the_traceback(flux):
    (flux.adapter / WEIGHTS).unlink()
    sources = ["--base", str(flux.base), "--adapter", str(flux.adapter), "--out", str(flux.outside / "x")]
    with pytest.raises(SourceError, match=r"holds no \.safetensors file$"):
        cli.main(["export", *sources, "--debug"])
