"""The judge of shape images: its files, the flawed images it trains on, what counts as right, a short training."""

from __future__ import annotations

import json

import pytest
import torch

from arcflow_export.errors import SourceError
from arcflow_export.images.flaws import FLAWS, clean_images, flawed_images
from arcflow_export.images.judge import FEATURES, Judge, Reading, judge_rates, train_judge
from arcflow_export.images.scenes import ATTRIBUTES, BACKGROUNDS, COLORS, render, sample


@pytest.fixture(scope="module")
def judge() -> Judge:
    return train_judge(seed=0, steps=1)


@pytest.fixture(scope="module")
def scenes():
    return sample(64, torch.Generator().manual_seed(3), held_out=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reading(words: dict[str, str], clean: float) -> Reading:
    attributes = {name: torch.tensor([ATTRIBUTES[name].index(word)]) for name, word in words.items()}
    return Reading(attributes, torch.tensor([clean]), torch.zeros(1, FEATURES))


SHOWN = {"shape": "heart", "color": "red", "size": "small", "position": "left", "background": "blue"}


def test_saving_loses_nothing(judge, tmp_path, scenes):
    judge.save(tmp_path)
    before, after = judge.read(render(scenes)), Judge.load(tmp_path).read(render(scenes))
    assert torch.equal(before.features, after.features) and torch.equal(before.clean, after.clean)
    assert all(torch.equal(before.attributes[name], after.attributes[name]) for name in ATTRIBUTES)
    assert (tmp_path / "model.safetensors").stat().st_size < 350_000


def test_batches_do_not_change_a_reading(judge, scenes):
    # Convolutions of another batch size may add in another order; features are of order 1.
    whole, parts = judge.read(render(scenes)), judge.read(render(scenes), batch=24)
    torch.testing.assert_close(whole.features, parts.features, atol=1e-5, rtol=1e-5)


def test_what_is_missing_or_damaged_is_named(judge, tmp_path):
    with pytest.raises(SourceError, match=r"judge: .*config\.json is missing"):
        Judge.load(tmp_path / "nowhere")
    judge.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SourceError, match=r"judge: .*model\.safetensors is missing or damaged \(.*\); train it again"):
        Judge.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attributes"]["shape"][0] = "star"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="must describe a ShapesJudge of this version's attributes"):
        Judge.load(tmp_path)


@pytest.mark.parametrize(
    ("named", "clean", "is_named", "is_right"),
    [
        ({}, 0.9, True, True),
        ({"shape": "heart"}, 0.9, True, True),
        (SHOWN, 0.9, True, True),
        (SHOWN, 0.5, True, False),
        (SHOWN | {"size": "large"}, 0.9, False, False),
        ({"color": "blue"}, 0.9, False, False),
    ],
)
def test_right_is_every_named_word_and_clean(named, clean, is_named, is_right):
    seen = reading(SHOWN, clean)
    assert (bool(seen.named([named])), bool(seen.right([named]))) == (is_named, is_right)


@pytest.mark.parametrize("flaw", FLAWS)
def test_every_flawed_image_differs_from_every_clean_one(flaw, scenes):
    """By more than the clean images' own errors do: blur, shift and noise of at most 0.02 each."""
    flawed, plain = flawed_images(scenes, flaw, generator()), render(scenes)
    assert flawed.shape == plain.shape and flawed.min() >= 0 and flawed.max() <= 1
    assert (clean_images(scenes, generator()) - plain).square().mean((1, 2, 3)).sqrt().max() < 0.05
    largest = (flawed - plain).abs().amax(1).flatten(1).topk(8).values[:, -1]  # in 8 pixels or more
    assert largest.min() > 0.06, flaw


def test_mixed_colors_are_off_the_palette(scenes):
    def nearest(images: torch.Tensor, palette: dict) -> torch.Tensor:
        corner = images[:, :, :4, :4].mean((2, 3))  # always background
        return torch.cdist(corner, torch.tensor(list(palette.values())) / 255).amin(1)

    # The colour shift moves each channel by at most 0.02, a distance of 0.035.
    assert nearest(clean_images(scenes, generator()), BACKGROUNDS).max() < 0.05
    assert nearest(flawed_images(scenes, "background", generator()), BACKGROUNDS).min() > 0.04
    centers = (scenes.center * 64).long()
    flawed = flawed_images(scenes, "color", generator())
    inside = torch.stack(
        [p[:, y - 1 : y + 2, x - 1 : x + 2].mean((1, 2)) for p, (x, y) in zip(flawed, centers, strict=True)]
    )
    assert torch.cdist(inside, torch.tensor(list(COLORS.values())) / 255).amin(1).min() > 0.04


@pytest.mark.slow
def test_training_learns_and_leaves_the_global_generator_alone():
    state, losses = torch.get_rng_state(), []
    judge = train_judge(seed=1, progress=losses.append, steps=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(losses) == 8 and losses[-1] < losses[0] - 1
    rates = judge_rates(judge, 8, seed=0)
    assert set(rates) == {*ATTRIBUTES, "false reject", *(f"false accept: {flaw}" for flaw in FLAWS)}
    assert all(0 <= rate <= 1 for rate in rates.values())
