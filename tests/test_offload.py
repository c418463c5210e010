"""Students whose weights stay on disk, against the same students in memory, bit for bit."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from arcflow_export.checkpoint.sources import Location
from arcflow_export.errors import SourceError
from arcflow_export.options import PARTS
from arcflow_export.student import memory
from arcflow_export.student import reference as student
from arcflow_export.student.offload import DiskWeights
from arcflow_export.student.reference import TorchStudent, pack
from tests.checkpoints import Sizes, make_adapter, make_base, make_style, open_student
from tests.conftest import FAMILIES, golden_student

PROMPT, LENGTH = "two cats", 24


def pair(source, dtype=torch.float32, **options) -> tuple[TorchStudent, TorchStudent]:
    """The student in memory and on disk."""
    return TorchStudent(source, dtype, offload=False, **options), TorchStudent(source, dtype, offload=True, **options)


@pytest.fixture(scope="module")
def unrounded(tmp_path_factory):
    """A function golden name -> the student with float32 weights that bfloat16 rounds; the golden ones are rounded."""

    @functools.cache
    def get(name):
        folder = shutil.copytree(golden_student(name).base.path.parent, tmp_path_factory.mktemp(name) / "student")
        for path in folder.rglob("*.safetensors"):
            save_file({key: value * 1.001 for key, value in load_file(path).items()}, path, {"format": "pt"})
        return open_student(folder)

    return get


def networks(drawn: TorchStudent) -> list[torch.nn.Module]:
    encoders = [drawn.pipe.text_encoder, getattr(drawn.pipe, "text_encoder_2", None)]
    return [drawn.transformer, *(encoder for encoder in encoders if encoder is not None)]


def on_disk(drawn: TorchStudent) -> list[list[str]]:
    """Names of the parameters that are not in memory, by network."""
    return [[name for name, p in network.named_parameters() if p.is_meta] for network in networks(drawn)]


def assert_equal(first: TorchStudent, second: TorchStudent) -> None:
    """Everything that a student can be asked for is the same, and nothing that was read stays in memory."""
    before = on_disk(second)
    assert first.on_disk is False and second.on_disk is True
    assert not any(on_disk(first)) and all(before)
    states, pooled = first.encode(PROMPT, LENGTH)
    other_states, other_pooled = second.encode(PROMPT, LENGTH)
    assert torch.equal(states, other_states) and states.dtype == other_states.dtype
    assert pooled is None or torch.equal(pooled, other_pooled)
    x = pack(torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(0)))
    arguments = (x, torch.tensor(0.7), states, pooled, 64, 48, 3.5)
    for mine, theirs in zip(first.predict(*arguments), second.predict(*arguments), strict=True):
        assert torch.equal(mine, theirs) and torch.isfinite(mine).all()
    mine, theirs = (drawn.generate(PROMPT, 64, 48, 2, 5, max_sequence_length=LENGTH) for drawn in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(mine.steps, theirs.steps, strict=True))
    assert torch.equal(mine.images, theirs.images)
    assert on_disk(second) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_those_of_memory(name, dtype, unrounded):
    """In float16 transformers keeps the last linear of T5's feed-forward in float32."""
    first, second = pair(unrounded(name), dtype)
    assert_equal(first, second)
    left = [n for n, p in second.transformer.named_parameters() if not p.is_meta]
    assert left and all("lora_" in n or n.startswith("norm_out.linear") for n in left), "the adapter alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_and_shards(dtype, tmp_path):
    """Two style LoRAs, unmerged in the transformer and merged in CLIP; a base of many files in bfloat16."""
    sizes = Sizes(layers=2, heads=1, axes=(2, 4, 6), dtype=torch.bfloat16, max_shard_size="20KB")
    make_base(tmp_path / "base", sizes)
    make_adapter(tmp_path / "adapter", sizes)
    modules = {
        "transformer.transformer_blocks.1.attn.to_q": (12, 12),
        "transformer.single_transformer_blocks.0.proj_mlp": (48, 12),
        "text_encoder.text_model.encoder.layers.0.self_attn.v_proj": (16, 16),
    }
    style = make_style(tmp_path / "style.safetensors", modules, alpha=1.0)
    loras = [(Location(str(style)), scale) for scale in (1.5, -0.5)]
    first, second = pair(open_student(tmp_path, loras), dtype)
    assert_equal(first, second)
    plain = TorchStudent(open_student(tmp_path), dtype, offload=True)
    (states, pooled), (plain_states, plain_pooled) = second.encode(PROMPT, LENGTH), plain.encode(PROMPT, LENGTH)
    assert torch.equal(states, plain_states) and not torch.equal(pooled, plain_pooled)
    arguments = (torch.ones(1, 12, 64), torch.tensor(0.7), states, pooled, 64, 48, 3.5)
    assert not torch.equal(second.predict(*arguments)[0], plain.predict(*arguments)[0])


@pytest.mark.parametrize(
    ("name", "backbone", "encoder", "encoder_layers"),
    [
        (
            "flux-tiny",
            "single_transformer_blocks.1.proj_out",
            "text_encoder_2",
            "encoder.block.1.layer.0.SelfAttention.q",
        ),
        ("qwen-tiny", "transformer_blocks.1.img_mlp.net.2", "text_encoder", "model.layers.1.mlp.down_proj"),
    ],
)
def test_mixed_precision(name, backbone, encoder, encoder_layers, unrounded):
    """As `arcflow verify` runs it: one dtype per part, and chosen linears in float32, rounded when they were loaded."""
    dtypes = dict.fromkeys(PARTS, torch.bfloat16) | {"conditioner": torch.float32, "vae_decoder": torch.float32}
    layers = {"backbone": [backbone, "proj_out_means"], encoder: [encoder_layers]}
    first, second = pair(unrounded(name), dtypes, reference_dtype=torch.bfloat16, float32_layers=layers)
    assert_equal(first, second)
    kept = second.transformer.get_submodule(backbone)
    assert getattr(kept, "base_layer", kept).weight.dtype == torch.float32


def test_a_batch_of_prompts(monkeypatch):
    """FLUX's prompts share one pass over the encoders' weights; Qwen-Image's go one by one, unpadded."""
    reads: list[str] = []
    original = DiskWeights.read
    monkeypatch.setattr(DiskWeights, "read", lambda self, name: reads.append(name) or original(self, name))
    prompts = [PROMPT, "an old sailor, oil painting"]
    for name in FAMILIES:
        first, second = pair(golden_student(name))
        encoded = second.encode_batch(prompts, LENGTH)
        assert len(reads) == len(set(reads)) * (1 if name == "flux-tiny" else 2)
        for mine, theirs in zip(first.encode_batch(prompts, LENGTH), encoded, strict=True):
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        # Alone, the sums of a matrix product may be taken in another order: float32's rounding, 2^-24 per operation,
        # over some hundred operations in a row.
        for prompt, (states, pooled) in zip(prompts, encoded, strict=True):
            alone, alone_pooled = second.encode(prompt, LENGTH)
            torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)
            assert pooled is None or torch.allclose(pooled, alone_pooled, rtol=1e-5, atol=1e-5)
        reads.clear()


def test_a_forward_that_fails_leaves_nothing_in_memory():
    drawn = TorchStudent(golden_student("flux-tiny"), offload=True)
    before = on_disk(drawn)
    linear = drawn.transformer.transformer_blocks[0].attn.to_q
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.zeros(1, 3))
    assert linear.weight.is_meta
    assert on_disk(drawn) == before


@pytest.mark.parametrize(
    ("component", "name"),
    [("transformer", "x_embedder.weight"), ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight")],
)
def test_a_missing_tensor(component, name, tmp_path):
    folder = shutil.copytree(golden_student("flux-tiny").base.path.parent, tmp_path / "student")
    (path,) = (folder / "base" / component).glob("*.safetensors")
    save_file({k: v for k, v in load_file(path).items() if k != name}, path, {"format": "pt"})
    with pytest.raises(SourceError) as raised:
        TorchStudent(open_student(folder), offload=True)
    assert str(raised.value) == f"{path.parent} has no tensor {name!r}; is the checkpoint complete?"


def test_who_stays_on_disk(monkeypatch):
    gib = 1 << 30
    assert not memory.stays_on_disk(20 * gib, 23 * gib)
    assert memory.stays_on_disk(20 * gib + 1, 23 * gib)
    source = golden_student("flux-tiny")
    needed = memory.weight_bytes(source, dict.fromkeys(PARTS, torch.float32))
    for free, expected in ((needed + 3 * gib, False), (needed + 3 * gib - 1, True)):
        monkeypatch.setattr(student, "free_bytes", lambda device, free=free: free)
        assert TorchStudent(source).on_disk is expected
    half = memory.weight_bytes(source, dict.fromkeys(PARTS, torch.bfloat16))
    assert half * 2 == needed


def test_free_bytes():
    """Less than the machine has, more than nothing."""
    import psutil

    assert 0 < memory.free_bytes() <= psutil.virtual_memory().total
