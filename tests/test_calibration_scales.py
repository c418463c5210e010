"""The file of scales: what is written is read back, and everything else is refused by the name of what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
from fake_bundle import make_bundle

from arcflow_calibration.summary import as_dict, summarise, table
from arcflow_export.errors import CalibrationError
from arcflow_export.formats.prompts import PRESETS, read_prompts
from arcflow_export.formats.scales import ActivationRange, PromptSet, Scales
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Source, seal
from tests.test_straight_runtime import make_straight

LAYER = "transformer_blocks.0.attn.to_q"


def make(**changes) -> Scales:
    parts = {
        "backbone": {
            LAYER: ActivationRange((1.5, 0.1 + 0.2), 128, (7.0, 0.0)),
            "single_transformer_blocks.0.proj_out": None,
        },
        "text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q": ActivationRange((3.0,), 64)},
    }
    parts["backbone"]["single_transformer_blocks.0.proj_out"] = ActivationRange((2.0, 5.0), 128, (65505.0, 1.0))
    values = {
        "base": Source("base", None, "a" * 64),
        "adapter": Source("owner/adapter", "1234", "b" * 64),
        "loras": (Source("style", None, "c" * 64, 0.8),),
        "family": "flux",
        "method": "max",
        "percentile": None,
        "prompts": PromptSet("general", "d" * 64, 2),
        "num_inference_steps": 2,
        "sizes": ((64, 96),),
        "guidance_scale": 3.5,
        "seed": 0,
        "tools": {"torch": "2"},
        "parts": parts,
    }
    return Scales(**(values | changes))


@pytest.fixture
def path(tmp_path):
    make().save(tmp_path / "scales.json")
    return tmp_path / "scales.json"


def rewrite(path, change):
    """Change the file's data and seal it again."""
    data = json.loads(path.read_text())
    data.pop("digest")
    change(data)
    path.write_text(json.dumps(data | {"digest": seal(data)}))
    return path


def test_round_trip(path):
    scales = Scales.load(path)
    assert scales == make()
    assert scales.digest == json.loads(path.read_text())["digest"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["scales.json"]
    # One line per layer, so that a change shows as a line in a review.
    assert f'   "{LAYER}": {{ "amax": [ 1.5, 0.30000000000000004 ], "samples": 128,' in path.read_text()


def test_amax_is_the_largest_of_the_steps(path):
    scales = Scales.load(path)
    assert scales.amax("backbone", LAYER) == 1.5
    assert scales.amax("backbone", "single_transformer_blocks.0.proj_out") == 5.0
    with pytest.raises(CalibrationError, match=r"backbone has no layer 'x'; were they made from another student"):
        scales.amax("backbone", "x")
    with pytest.raises(CalibrationError, match=r"text_encoder was not calibrated, only backbone, text_encoder_2"):
        scales.amax("text_encoder", "x")


def test_reading_needs_neither_torch_nor_modelopt():
    code = "import sys, arcflow_export.formats.scales as s; sys.exit(bool({'torch', 'modelopt'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version must be 1, got 2; update arcflow"),
        (lambda d: d.update(version=True), "version must be 1, got True"),
        (lambda d: d.update(format="arcflow-bundle"), "'format' must be 'arcflow-scales'"),
        (lambda d: d.update(colour=1), r"unknown keys \['colour'\]"),
        (lambda d: d.pop("base"), r"missing keys \['base'\]"),
        (lambda d: d.update(method="entropy"), "method must be one of"),
        (lambda d: d.update(percentile=99.0), "percentile must be null for method max, got 99.0"),
        (lambda d: d.update(method="percentile"), "percentile must be above 0 and at most 100, got None"),
        (
            lambda d: d.update(method="percentile", percentile=0.0),
            "percentile must be above 0 and at most 100, got 0.0",
        ),
        (lambda d: d.update(method="percentile", percentile=100.5), "percentile must be above 0 and at most 100"),
        (lambda d: d.update(num_inference_steps=0), "num_inference_steps must be at least 1, got 0"),
        (lambda d: d.update(guidance_scale=float("nan")), "guidance_scale must be finite, got nan"),
        (lambda d: d.update(sizes=[[64, 64], [64, 72]]), "sizes must be pairs of multiples of 16"),
        (lambda d: d.update(sizes=[[64, 0]]), "sizes must be pairs of multiples of 16"),
        (lambda d: d.update(sizes=[]), "sizes must be pairs of multiples of 16"),
        (lambda d: d.update(sizes=[[64]]), r"sizes must be pairs of multiples of 16, got \[\[64\]\]"),
        (lambda d: d.update(parts={}), "parts must be at least one"),
        (lambda d: d["parts"].update(backbone={}), "parts.backbone must be at least one layer"),
        (lambda d: d["prompts"].update(count=0), "prompts: count must be at least 1, got 0"),
    ],
)
def test_a_broken_rule(path, change, message):
    with pytest.raises(CalibrationError, match=message):
        Scales.load(rewrite(path, change))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("amax", [1.0, float("nan")], r"amax must be positive and finite, got \[1.0, nan\]"),
        ("amax", [1.0, float("inf")], "amax must be positive and finite"),
        ("amax", [1.0, -1.0], "amax must be positive and finite"),
        ("amax", [0.0, 1.0], "amax must be positive and finite"),
        ("amax", [1.0], "amax must be 2 values, one per step, got"),
        ("amax", [1.0, "2"], r"amax\[1\] must be of type float"),
        ("output_amax", [1.0], "output_amax must be 2 values, one per step"),
        ("output_amax", [1.0, float("nan")], "output_amax must be finite, 0 or more"),
        ("samples", 0, "samples must be at least 1, got 0"),
    ],
)
def test_a_bad_range_is_named(path, key, value, message):
    with pytest.raises(CalibrationError, match=message) as error:
        Scales.load(rewrite(path, lambda d: d["parts"]["backbone"][LAYER].update({key: value})))
    assert LAYER in str(error.value)


def test_a_text_encoder_has_one_value(path):
    def change(data):
        next(iter(data["parts"]["text_encoder_2"].values()))["amax"] = [1.0, 2.0]

    with pytest.raises(CalibrationError, match="amax must be one value"):
        Scales.load(rewrite(path, change))


def test_damaged_files(path, tmp_path):
    text = path.read_text()
    path.write_text(text.replace("1.5", "1.25"))
    with pytest.raises(CalibrationError, match="does not match its own digest; it was edited"):
        Scales.load(path)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CalibrationError, match="is not valid JSON"):
        Scales.load(path)
    with pytest.raises(CalibrationError, match="is not a file; make one with `arcflow calibrate`"):
        Scales.load(tmp_path / "none.json")


def test_a_key_that_is_there_twice(path):
    text = path.read_text()
    path.write_text(text.replace('"seed": 0,', '"seed": 0,\n "seed": 0,'))
    with pytest.raises(CalibrationError, match=r"is not valid JSON \(an object has the key 'seed' twice\); calibrate"):
        Scales.load(path)


def test_scales_of_other_runs_than_the_bundles_are_warned_of(tmp_path):
    manifest = Bundle.open(make_bundle(tmp_path / "bundle")).manifest  # 64 text tokens, shift 3.2, ratio 1, 2 steps
    assert make().warnings(manifest) == ()
    same = {"max_sequence_length": 64, "shift": 3.2, "timestep_ratio": 1.0}
    assert make(**same).warnings(manifest) == ()
    other = {"max_sequence_length": 512, "shift": 2.0, "timestep_ratio": 0.5}
    assert make(**other).warnings(manifest) == tuple(
        f"the scales were made with {key} {mine}, the bundle has {theirs}; "
        f"calibrate with --{key.replace('_', '-')} {theirs}, or the ranges may not fit"
        for key, mine, theirs in (
            ("max_sequence_length", 512, 64),
            ("shift", 2, 3.2),
            ("timestep_ratio", 0.5, 1),
        )
    )
    (steps,) = make(num_inference_steps=4).warnings(manifest)
    assert steps.startswith("the scales were made with num_inference_steps 4, the bundle has 2; ")


def test_negative_prompts_are_kept_and_other_files_have_no_such_keys(path, tmp_path):
    assert not {"negative_prompts", "true_cfg_scale"} & json.loads(path.read_text()).keys()
    guided = make(negative_prompts=(" ", "blurred"), true_cfg_scale=4.0)
    guided.save(tmp_path / "guided.json")
    assert Scales.load(tmp_path / "guided.json") == guided
    straight = make_straight(tmp_path / "qwen", "qwen-image")
    (warning,) = make().warnings(Bundle.open(straight).manifest)
    assert warning == (
        "the scales were made without a negative prompt, and the bundle is guided by one; calibrate without "
        "--true-cfg-scale 1, or the ranges may not fit"
    )
    assert guided.warnings(Bundle.open(straight).manifest) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 0.0}, "shift must be positive and finite, got 0.0"),
        ({"timestep_ratio": 1.5}, "timestep_ratio must be above 0 and at most 1, got 1.5"),
        ({"negative_prompts": ()}, r"negative_prompts must be at least one, or null, got \[\]"),
        ({"negative_prompts": ("x",)}, "true_cfg_scale must be above 1 and finite, got None"),
        ({"negative_prompts": ("x",), "true_cfg_scale": 1.0}, "true_cfg_scale must be above 1 and finite, got 1.0"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale must be null without negative_prompts, got 4.0"),
    ],
)
def test_a_schedule_out_of_range(tmp_path, change, message):
    with pytest.raises(CalibrationError, match=message):
        make(**change).save(tmp_path / "scales.json")


def test_bad_values_are_not_written(tmp_path):
    bad = make(parts={"backbone": {LAYER: ActivationRange((1.0, float("nan")), 1)}})
    with pytest.raises(CalibrationError, match="positive and finite"):
        bad.save(tmp_path / "scales.json")
    assert not list(tmp_path.iterdir())


def manifest_of(scales, root):
    manifest = Bundle.open(make_bundle(root / "bundle")).manifest
    provenance = dataclasses.replace(
        manifest.provenance, base=scales.base, adapter=scales.adapter, loras=tuple(reversed(scales.loras))
    )
    return dataclasses.replace(manifest, provenance=provenance)


def test_scales_belong_to_base_adapter_and_loras(tmp_path):
    scales = make(loras=(Source("a", None, "1" * 64, 1.0), Source("b", None, "2" * 64, 0.5)))
    manifest = manifest_of(scales, tmp_path)
    scales.check_belongs(manifest)
    # A name is no identity: the same weights may lie elsewhere.
    dataclasses.replace(scales, base=dataclasses.replace(scales.base, name="elsewhere")).check_belongs(manifest)

    for field, other, expected in (
        (
            "base",
            Source("b2", None, "e" * 64),
            ["base 'b2' (sha256 eeeeeeeeeeee), the bundle 'base' (sha256 aaaaaaaaa"],
        ),
        ("adapter", Source("a2", None, "e" * 64), ["adapter 'a2' (sha256 eeeeeeeeeeee), the bundle 'owner/adapter'"]),
        ("loras", (), ["LoRAs none, the bundle 'b' x 0.5 (sha256 222222222222), 'a' x 1 (sha256 111111111111)"]),
        ("loras", (scales.loras[0], Source("b", None, "2" * 64, 0.6)), ["LoRAs", "'b' x 0.6", "'b' x 0.5"]),
    ):
        with pytest.raises(CalibrationError, match="they belong to another student") as error:
            dataclasses.replace(scales, **{field: other}).check_belongs(manifest)
        for words in expected:
            assert words in str(error.value)
        for name in {"base", "adapter", "LoRAs"} - {field, "LoRAs" if field == "loras" else field}:
            assert f"with {name} " not in str(error.value)
    with pytest.raises(CalibrationError, match="they belong to a qwen-image student, the bundle is flux"):
        dataclasses.replace(scales, family="qwen-image").check_belongs(manifest)


def test_summary():
    backbone, text = summarise(make())
    assert (backbone.layers, backbone.differing) == (2, 2)
    assert backbone.ratio == pytest.approx(1.5 / 0.3)
    assert (backbone.ratio_layer, backbone.overflowing) == (LAYER, ("single_transformer_blocks.0.proj_out",))
    assert (text.layers, text.ratio, text.differing, text.overflowing) == (1, 1.0, 0, ())
    assert "  overflows float16: single_transformer_blocks.0.proj_out" in table([backbone, text]).splitlines()
    json.dumps(as_dict([backbone, text]))


def test_steps_that_differ_by_just_twice_are_not_counted():
    ranges = {
        "a": ActivationRange((1.0, 2.0), 1, (65504.0, 1.0)),
        "b": ActivationRange((1.0, 1.5, 3.0), 1),
        "c": ActivationRange((3.0, 1.0), 1),
    }
    (part,) = summarise(make(parts={"backbone": ranges}))
    assert (part.differing, part.ratio, part.ratio_layer, part.overflowing) == (2, 3.0, "b", ())


def test_presets():
    counts = {name: read_prompts(name).record.count for name in PRESETS}
    assert counts == {"general": 128, "shapes": 64}
    for name in PRESETS:
        texts = read_prompts(name).texts
        assert len(set(texts)) == len(texts)
        assert read_prompts(name, 3).texts == texts[:3]
    assert any("看书" in text for text in read_prompts("general").texts)
    assert max(len(text.split()) for text in read_prompts("general").texts) > 70


def test_prompts_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("  a\n\nb  \n", encoding="utf-8")
    prompts = read_prompts(str(file))
    assert prompts.texts == ("a", "b")
    assert (prompts.record.name, prompts.record.count) == ("mine.txt", 2)
    assert prompts.record.sha256 == hashlib.sha256(b"a\nb\n").hexdigest()
    file.write_text("\n \n")
    with pytest.raises(CalibrationError, match="is empty; write one prompt per line"):
        read_prompts(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match=r"is not UTF-8 text; save it as UTF-8$"):
        read_prompts(str(file))
    with pytest.raises(
        CalibrationError, match="must be general, shapes or a file with one prompt per line, got 'genral'"
    ):
        read_prompts("genral")
