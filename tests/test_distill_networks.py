"""Teacher and student on tiny random checkpoints of both families."""

from __future__ import annotations

import math

import pytest
import torch

from arcflow_distill.errors import DistillError
from arcflow_distill.train.networks import (
    BIAS_NOISE,
    Canvas,
    StudentNetwork,
    TeacherNetwork,
    arguments,
    base_family,
    count_by_kind,
    load_transformer,
    lora_targets,
    make_heads,
)
from arcflow_distill.train.policy import Policy, warp
from arcflow_distill.train.prompts import TextBatch
from tests.checkpoints import Sizes, make_base
from tests.checkpoints import lora_targets as released_targets

CANVAS = Canvas(2, 3, 3.5)
SIZES = [Sizes(), Sizes(guidance=False, single_layers=2), Sizes(family="qwen", layers=2)]
FAMILIES = {"flux": "flux", "qwen": "qwen-image"}


@pytest.fixture(scope="module", params=SIZES, ids=["flux", "flux-free", "qwen"])
def base(request, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", request.param), request.param


def text(sizes, batch=2, mask=None, seed=3):
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(batch, sizes.pooled_dim, generator=g) if sizes.flux else None
    return TextBatch(torch.randn(batch, 5, sizes.text_dim, generator=g), mask, pooled)


def inputs(batch=2):
    g = torch.Generator().manual_seed(4)
    return torch.randn(batch, CANVAS.tokens, 64, generator=g), torch.tensor([1.0, 0.6])[:batch]


def open_both(base, modes=3, rank=4, true_cfg_scale=1.0):
    path, sizes = base
    family = base_family(path)
    torch.manual_seed(0)
    transformer = load_transformer(path, family, torch.float32)
    teacher = TeacherNetwork(transformer, family, true_cfg_scale)
    return teacher, StudentNetwork(transformer, family, modes, rank, 0.0), sizes


def test_targets_are_the_released_adapters(base):
    path, sizes = base
    transformer = load_transformer(path, FAMILIES[sizes.family], torch.float32)
    assert sorted(lora_targets(transformer, FAMILIES[sizes.family])) == sorted(released_targets(sizes))


def test_what_is_trained(base):
    _, student, sizes = open_both(base)
    trained = student.trained()
    modules = {name.split(".lora_")[0] for name in trained if "lora" in name}
    assert modules == set(released_targets(sizes))
    others = {name for name in trained if "lora" not in name}
    heads = ("proj_out_means", "proj_out_logweights", "proj_out_loggamma", "norm_out.linear")
    assert others == {f"{h}.{leaf}" for h in heads for leaf in ("weight", "bias")}
    counts = count_by_kind(trained)
    assert sum(counts.values()) == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert counts["norm_out"] == 2 * sizes.dim * (sizes.dim + 1)
    # Three modes: 3 x 64 means, 3 x 4 weights and 2 x 4 gammas from each of dim numbers and a bias.
    assert counts["heads"] == (3 * 64 + 3 * 4 + 2 * 4) * (sizes.dim + 1)


@pytest.mark.parametrize("modes", [1, 3])
def test_an_untrained_student_has_the_teachers_velocity(base, modes):
    teacher, student, sizes = open_both(base, modes)
    latents, _ = inputs()
    sigma = warp(torch.tensor(0.5)).expand(2)
    with torch.no_grad():
        policy = Policy.from_heads(*student(latents, sigma, text(sizes), CANVAS), float(sigma[0]))
    velocity = policy.average(sigma[:, None], sigma[:, None])[:, 0]
    difference = velocity - teacher(latents, sigma, text(sizes), CANVAS)
    noise = difference[0, 0]  # the same for every token and sample: the mean of the modes' bias noise
    assert torch.allclose(difference, noise.expand_as(difference), atol=2e-5)
    sub_pixels = noise.unflatten(0, (-1, 4))
    assert torch.allclose(sub_pixels, sub_pixels[:, :1].expand_as(sub_pixels), atol=2e-5)
    assert noise.std() == pytest.approx(BIAS_NOISE / math.sqrt(modes), rel=0.6)


def test_heads_begin_with_log_spaced_gammas():
    torch.manual_seed(0)
    heads = make_heads(torch.nn.Linear(8, 64), 16)
    _, logweights, loggammas = heads(torch.randn(1, 2, 8))
    assert (logweights == 0).all()
    gammas = loggammas[0, 0].exp()
    assert torch.allclose(gammas, gammas[:, :1].expand(15, 4))
    assert torch.allclose(gammas[[0, -1], 0], torch.tensor([0.2, 4.0]))
    assert torch.allclose(gammas[1:, 0] / gammas[:-1, 0], torch.tensor(20 ** (1 / 14)), rtol=1e-4)


def test_the_teacher_stays_as_it_was(base):
    """The base's parameters are shared, and no step of the student reaches the teacher."""
    path, sizes = base
    fresh = TeacherNetwork(load_transformer(path, base_family(path), torch.float32), base_family(path))
    teacher, student, _ = open_both(base)
    latents, sigma = inputs()
    before = fresh(latents, sigma, text(sizes), CANVAS)
    assert torch.equal(teacher(latents, sigma, text(sizes), CANVAS), before)
    optimizer = torch.optim.AdamW(student.trained().values(), 0.1)
    for _ in range(2):
        means, _, _ = student(latents, sigma, text(sizes), CANVAS)
        means.square().mean().backward()
        optimizer.step()
    assert not torch.equal(student(latents, sigma, text(sizes), CANVAS)[0], means)
    assert torch.equal(teacher(latents, sigma, text(sizes), CANVAS), before)
    shared = {p.data_ptr() for p in teacher.transformer.parameters()}
    own = [p for p in student.parameters() if not p.requires_grad]
    assert all(p.data_ptr() in shared for p in own), "the base is in memory once"


def test_a_network_is_told_places_guidance_and_text(base):
    """Of 2 x 3 tokens: rows and columns of the image in ids 1 and 2, zeros for text, guidance where it is taken."""
    teacher, _, sizes = open_both(base)
    latents, sigma = inputs()
    mask = None if sizes.flux else torch.ones(2, 5, dtype=torch.bool)
    given = text(sizes, mask=mask)
    found = arguments(teacher.transformer, teacher.family, latents, sigma, given, Canvas(2, 3, 2.5))
    assert torch.equal(found["hidden_states"], latents) and torch.equal(found["timestep"], sigma)
    assert torch.equal(found["encoder_hidden_states"], given.states)
    if sizes.flux:
        assert found["img_ids"].tolist() == [[0, row, column] for row in range(2) for column in range(3)]
        assert found["txt_ids"].tolist() == [[0, 0, 0]] * 5
        assert torch.equal(found["pooled_projections"], given.pooled)
        assert found["guidance"].tolist() == [2.5, 2.5] if sizes.guidance else found["guidance"] is None
    else:
        assert found["img_shapes"] == [[(1, 2, 3)]] * 2 and found["encoder_hidden_states_mask"] is mask


def test_the_factors_dropout_and_scale(base):
    path, _ = base
    student = StudentNetwork(load_transformer(path, base_family(path), torch.float32), base_family(path), 2, 4, 0.25)
    layers = [m for m in student.modules() if hasattr(m, "lora_dropout")]
    assert layers and all(m.lora_dropout["default"].p == 0.25 and m.scaling["default"] == 1 for m in layers)


def test_rotary_tables_of_a_student_are_rounded_to_its_base(tmp_path):
    """With a bfloat16 base the teacher gets float32 tables, the student the same rounded to bfloat16."""
    transformer = load_transformer(make_base(tmp_path / "base", SIZES[0]), "flux", torch.bfloat16)
    teacher = TeacherNetwork(transformer, "flux")
    student = StudentNetwork(transformer, "flux", 2, 4, 0.0)
    ids = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 5.0]])
    exact, rounded = teacher.transformer.pos_embed(ids), student.transformer.pos_embed(ids)
    for a, b in zip(exact, rounded, strict=True):
        assert torch.equal(b, a.bfloat16().float()) and b.dtype == torch.float32 and not torch.equal(a, b)


def test_guidance_against_the_negative_prompt(base):
    teacher, _, sizes = open_both(base, true_cfg_scale=4.0)
    plain, _, _ = open_both(base)
    latents, sigma = inputs()
    positive, negative = text(sizes), text(sizes, seed=5)
    pooled = torch.cat([negative.pooled, positive.pooled]) if sizes.flux else None
    both = TextBatch(torch.cat([negative.states, positive.states]), None, pooled)
    v, u = (plain(latents, sigma, t, CANVAS) for t in (positive, negative))
    assert torch.allclose(teacher(latents, sigma, both, CANVAS), u + 4 * (v - u), atol=1e-4)


def test_padding_is_not_seen(tmp_path):
    """A Qwen-Image prompt in a batch with a longer one gives what it gives alone."""
    teacher, _, sizes = open_both((make_base(tmp_path / "base", SIZES[2]), SIZES[2]))
    latents, sigma = inputs()
    full = text(sizes)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = teacher(latents, sigma, TextBatch(full.states, mask, None), CANVAS)
    alone = teacher(latents[1:], sigma[1:], TextBatch(full.states[1:, :3], None, None), CANVAS)
    assert torch.allclose(batch[1:], alone, atol=1e-5)


def test_other_pipelines_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "transformer").mkdir()
    with pytest.raises(DistillError, match="FluxPipeline, QwenImagePipeline"):
        base_family(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "transformer" / "config.json").write_text('{"in_channels": 384}')
    with pytest.raises(DistillError, match="in_channels must be 64, got 384"):
        base_family(tmp_path)
