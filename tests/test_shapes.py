"""The procedural set of shapes and the stages that train the small model on it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from arcflow_distill.shapes.loop import Average, Muon, rate
from arcflow_distill.shapes.teacher import Captions, pack
from arcflow_distill.shapes.tokenizers import captions, clip_tokenizer, t5_tokenizer
from arcflow_distill.shapes.vae import build, encode
from arcflow_export.images import scenes as sc
from arcflow_runtime import cli


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(**words: str) -> sc.Scenes:
    """A scene without jitter; what is not named is a small red circle in the centre on white."""
    words = {"shape": "circle", "color": "red", "size": "small", "position": "center", "background": "white"} | words
    attributes = {name: torch.tensor([sc.ATTRIBUTES[name].index(word)]) for name, word in words.items()}
    center = torch.tensor([sc.POSITIONS[words["position"]]])
    return sc.Scenes(attributes, center, torch.tensor([sc.SIZES[words["size"]]]))


def test_sampling_is_seeded_and_keeps_held_out_pairs_apart():
    first, again = sc.sample(500, generator()), sc.sample(500, generator())
    assert torch.equal(first.center, again.center)
    assert all(torch.equal(first.attributes[n], again.attributes[n]) for n in sc.ATTRIBUTES)
    pairs = {(w["shape"], w["color"]) for w in map(first.words, range(500))}
    assert not pairs & set(sc.HELD_OUT) and len(pairs) == 30
    held = sc.sample(200, generator(), held_out=True)
    assert {(w["shape"], w["color"]) for w in map(held.words, range(200))} == set(sc.HELD_OUT)


def test_held_out_pairs_use_each_shape_and_colour_once():
    assert sorted(s for s, _ in sc.HELD_OUT) == sorted(sc.SHAPES)
    assert sorted(c for _, c in sc.HELD_OUT) == sorted(sc.COLORS)


@pytest.mark.parametrize(
    ("words", "variant", "expected"),
    [
        ({}, 0, "a shape"),
        ({"color": "orange"}, 0, "an orange shape"),
        ({"size": "large", "color": "orange", "shape": "heart"}, 0, "a large orange heart"),
        ({"shape": "circle", "position": "left", "background": "blue"}, 0, "a circle on the left, blue background"),
        ({"shape": "circle", "background": "blue"}, 1, "a circle on a blue background"),
    ],
)
def test_captions_read_like_english(words, variant, expected):
    assert sc.caption(words, variant) == expected


def test_captions_name_attributes_as_often_as_stated():
    draw, words = generator(3), one().words(0)
    named = [sc.name_some(words, draw) for _ in range(4000)]
    for name, share in sc.NAMED.items():
        count = sum(name in n for n in named)
        assert abs(count / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * 0.95**2),
        ("square", 1.66**2),
        ("triangle", 3 * math.sqrt(3) / 4 * 1.15**2),
        ("diamond", 2 * 1.12**2),
        ("cross", 2 * 2 * 0.66 - 0.66**2),
        # A square of side 1 / sqrt(2) and two half discs of that diameter, enlarged by 1.72.
        ("heart", (0.5 + math.pi / 8) * 1.72**2),
    ],
)
@pytest.mark.parametrize("resolution", [64, 256])
def test_shapes_have_their_exact_area(shape, area, resolution):
    scene = one(shape=shape, size="large", color="blue", background="black")
    picture = sc.render(scene, resolution)[0]
    background, color = (torch.tensor(c[w]) / 255 for c, w in ((sc.BACKGROUNDS, "black"), (sc.COLORS, "blue")))
    coverage = ((picture - background[:, None, None]) / (color - background)[:, None, None])[2]
    # A coverage ramp one pixel wide is exact along straight edges; corners differ by a fraction of a pixel each.
    assert coverage.sum().item() / resolution**2 == pytest.approx(area * sc.SIZES["large"] ** 2, rel=1.5 / resolution)
    assert coverage.min() >= -1e-6 and coverage.max() <= 1 + 1e-6


def test_edges_are_smooth_and_one_pixel_wide():
    row = sc.render(one(shape="square", size="large", background="black"))[0, 0, 32]
    between = (row > row.min() + 0.01) & (row < row.max() - 0.01)
    assert 1 <= between.sum() <= 4  # a pixel or two on either side


def test_every_caption_fits_and_is_whole_words(tmp_path):
    texts, t5, clip = captions(), t5_tokenizer(), clip_tokenizer()
    assert len(set(texts)) == len(texts)
    for text in texts[:: max(1, len(texts) // 300)]:
        ids = t5(text).input_ids
        assert len(ids) <= sc.MAX_SEQUENCE_LENGTH and t5.unk_token_id not in ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 1
        assert len(clip(text).input_ids) == len(ids) + 1
    t5.save_pretrained(tmp_path / "t5")
    clip.save_pretrained(tmp_path / "clip")
    assert T5TokenizerFast.from_pretrained(tmp_path / "t5")(texts[-1]).input_ids == t5(texts[-1]).input_ids
    assert CLIPTokenizer.from_pretrained(tmp_path / "clip")(texts[-1]).input_ids == clip(texts[-1]).input_ids
    assert t5.unk_token_id in t5("a large robot").input_ids


def test_caption_ids_are_the_tokenizers():
    text = "a small purple triangle in the center, pink background"
    clip, t5 = Captions().ids([text])
    ids = t5_tokenizer()(text).input_ids
    assert t5[0].tolist() == ids + [0] * (sc.MAX_SEQUENCE_LENGTH - len(ids))
    whole = clip_tokenizer()(text).input_ids
    assert clip[0, : len(whole)].tolist() == whole


def test_packing_is_channel_major():
    latents = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    packed = pack(latents)
    assert packed.shape == (2, 4, 12)
    assert torch.equal(packed[0, 1].view(3, 2, 2), latents[0, :, :2, 2:])


def test_muon_steps_are_orthogonal():
    for shape in ((6, 6), (4, 3, 3, 3), (20, 5)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator())
        Muon([parameter], lr=1.0).step()
        rows, columns = parameter.flatten(1).shape
        singular = torch.linalg.svdvals(parameter.detach().flatten(1)) / max(1, rows / columns) ** 0.5
        # The iteration's fixed band (Keller Jordan): singular values end between about 0.7 and 1.2.
        assert singular.max() < 1.25 and singular.median() > 0.65


def test_average_and_rate():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average([parameter], 0.9)
    expected = 0.0
    for n in range(50):
        parameter.data.fill_(n)
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    average.store()
    assert parameter[0].item() == pytest.approx(expected, rel=1e-5)
    assert [rate(i, 100, 10) for i in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert rate(100, 100, 10) == pytest.approx(0)


def test_vae_halves_three_times():
    vae = build()
    pictures = sc.render(sc.sample(3, generator()))
    latents = encode(vae, pictures, batch=2)
    assert latents.shape == (3, 16, 8, 8)
    assert vae.decode(latents).sample.shape == (3, 3, 64, 64)


@pytest.mark.lengthy
@pytest.mark.slow
def test_whole_recipe_in_miniature(tmp_path, capfd):
    out = tmp_path / "shapes"
    assert cli.main(["train-shapes", "--out", str(out), "--scale", "1e-4"]) == 0
    notes = json.loads((out / "recipe.json").read_text())
    assert set(notes["seconds"]) == {"judge", "vae", "teacher", "adapter", "eval"}
    assert (out / "eval" / "contact_sheet.png").stat().st_size > 10_000
    capfd.readouterr()
    assert cli.main(["train-shapes", "--out", str(out), "--scale", "1e-4"]) == 0
    assert capfd.readouterr().out.count("done before") == 5
    bundle = tmp_path / "bundle"
    arguments = ["--base", out / "teacher", "--adapter", out / "adapter", "--out", bundle, "--max-px", "64"]
    assert cli.main(["export", *map(str, arguments), "--max-sequence-length", "12"]) == 0
    assert cli.main(["generate", str(bundle), "a red circle", "--out", str(tmp_path / "a.png"), "--seed", "1"]) == 0


@pytest.mark.parametrize(("option", "value"), [("--scale", "0"), ("--seed", "-1"), ("--out", "missing/folder/x")])
def test_recipe_refuses_bad_options(option, value, tmp_path, capsys):
    assert cli.main(["train-shapes", "--out", str(tmp_path / "x"), option, value]) == 2
    assert option in capsys.readouterr().err
