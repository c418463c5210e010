"""The drift gate: measures, comparability, layers, sensitivity, thresholds, report and command, on FP8 goldens."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

from arcflow_export.drift import gate, sensitivity
from arcflow_export.drift import write_report as drift_folder
from arcflow_export.drift.cases import DriftCase, read_cases
from arcflow_export.drift.comparable import check_comparable, same_parts
from arcflow_export.drift.compare import DriftPlan, ShownImages, compare
from arcflow_export.drift.graphs import block_of, leave_out, linears, quantized_layers
from arcflow_export.drift.layers import LayerDrift
from arcflow_export.drift.measures import gmsd, mean, psnr_db, relative_error
from arcflow_export.drift.sensitivity import Effect, Unit
from arcflow_export.drift.stages import BundleStages
from arcflow_export.emulate.blocks import BlockEngine
from arcflow_export.emulate.emulate import load_graph
from arcflow_export.errors import ExportError
from arcflow_export.formats.policy import load_policy
from arcflow_export.formats.thresholds import Thresholds
from arcflow_export.images.statistics import Interval
from arcflow_runtime import cli
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Latents, Source
from arcflow_runtime.errors import BundleError, RequestError
from tests.conftest import GOLDEN, SHAPES, SHAPES_OPTIONS
from tests.quantized import edit_backbone, local_drift, make_fp8, scene

CASES = (DriftCase("a red circle", 0), DriftCase("portrait of an old sailor, oil painting", 1), DriftCase("nothing", 2))
#: No limits but the defaults for single layers.
OPEN = Thresholds()
SIZE = ("--height", "64", "--width", "64")


@pytest.fixture(scope="module")
def reference(bundles):
    return bundles("flux-tiny")


@pytest.fixture(scope="module")
def fp8(reference, tmp_path_factory):
    return make_fp8(reference, tmp_path_factory.mktemp("fp8") / "bundle", CASES)


@pytest.fixture(scope="module")
def nvfp4(reference, tmp_path_factory):
    """The MLPs in NVFP4, attention in FP8."""
    return make_fp8(reference, tmp_path_factory.mktemp("nvfp4") / "bundle", CASES, "flux-nvfp4")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(c.prompt for c in CASES), encoding="utf-8")
    return path


def verify(candidate, reference, *more) -> int:
    return cli.main(["verify", str(candidate), "--against", str(reference), *SIZE, *map(str, more)])


def stages_of(bundle: Bundle) -> BundleStages:
    return BundleStages(bundle, CASES, scene(bundle), bundle.manifest.reference_dtype)


# Measures.


def test_relative_error_is_rms_of_the_difference_over_rms_of_the_reference():
    reference = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    got = reference + np.array([[0.0, 1.0], [0.0, 0.0], [np.nan, 0.0]])
    assert relative_error(got, reference).tolist() == [1 / 5, 0, np.inf]


def test_psnr_of_a_known_difference():
    reference = np.zeros((2, 4, 4, 3), np.uint8)
    got = reference.copy()
    got[0] += 51  # a fifth of the peak: 20 log10(5) dB
    assert psnr_db(got, reference) == pytest.approx([20 * np.log10(5), 100])


def test_gmsd_sees_lost_edges_and_no_shift_of_brightness():
    rng = np.random.default_rng(0)
    picture = np.full((1, 32, 32, 3), 60, np.uint8)
    picture[:, 8:24, 8:24] = 180
    flat = np.full_like(picture, 60)
    noisy = (picture + rng.integers(0, 12, picture.shape)).astype(np.uint8)
    assert gmsd(picture, picture) == 0
    # The grey weights sum to 1, so that a shift is the same everywhere, and its gradient is 0 up to rounding.
    assert gmsd(picture + 40, picture) == pytest.approx(0, abs=1e-9)
    assert 0.005 < gmsd(noisy, picture)[0] < 0.5 * gmsd(flat, picture)[0]


def test_a_mean_with_one_bad_prompt_is_not_finite():
    interval = mean(np.array([0.1, np.inf]))
    assert interval.value == interval.low == interval.high == np.inf
    assert mean(np.array([0.1, 0.3])).value == pytest.approx(0.2)


# Comparability.


def changed(bundle, tmp_path, **changes) -> Bundle:
    opened = Bundle.open(bundle)
    return dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, **changes))


def test_parts_in_the_same_files_are_found(command_run, reference, fp8, tmp_path):
    parts = set(Bundle.open(reference).manifest.parts)
    assert same_parts(Bundle.open(fp8), Bundle.open(reference)) == parts - {"backbone"}
    other = edit_backbone(reference, tmp_path / "other", "proj_out_means.bias", 2.0)
    assert same_parts(Bundle.open(other), Bundle.open(reference)) == parts - {"backbone"}
    assert same_parts(Bundle.open(command_run.bundle), Bundle.open(reference)) == set()


def test_bundles_of_other_students_are_refused_by_what_differs(reference, tmp_path):
    opened = Bundle.open(reference)
    p, schedule = opened.manifest.provenance, opened.manifest.schedule
    other = changed(
        reference,
        tmp_path,
        provenance=dataclasses.replace(
            p, adapter=Source("other", None, "1" * 64), loras=(Source("style", None, "2" * 64),)
        ),
        schedule=dataclasses.replace(schedule, shift=3.0),
    )
    with pytest.raises(ExportError) as e:
        check_comparable(other, opened)
    message = str(e.value)
    assert f"adapter other (sha256 111111111111) and adapter (sha256 {p.adapter.sha256[:12]})" in message
    assert "LoRAs ['style'] and []" in message
    assert "schedule (shift=3.0" in message and "(shift=3.2" in message
    assert "base" not in message.split(": ", 1)[1].split("; give")[0]


def test_a_lora_of_another_strength_is_another_student(reference, tmp_path):
    p = Bundle.open(reference).manifest.provenance
    a, b = (
        changed(reference, tmp_path, provenance=dataclasses.replace(p, loras=(Source("style", None, "2" * 64, s),)))
        for s in (0.5, 0.8)
    )
    with pytest.raises(ExportError, match=r"LoRA 1 style \(sha256 222222222222, scale 0.5\) and style"):
        check_comparable(a, b)


def test_modes_count_too(reference, tmp_path):
    latents = Bundle.open(reference).manifest.latents
    other = changed(reference, tmp_path, latents=dataclasses.replace(latents, num_gaussians=3))
    assert isinstance(latents, Latents)
    with pytest.raises(ExportError, match=r"latents .*num_gaussians=3"):
        check_comparable(other, Bundle.open(reference))


def test_a_quantised_reference_is_refused(fp8, reference, capsys):
    assert verify(reference, fp8, "--limit", 1) == 1
    assert "a reference must not be quantised, but layer transformer_blocks.0" in capsys.readouterr().err


# Graphs.


def test_layers_are_those_of_the_manifest(fp8):
    bundle = Bundle.open(fp8)
    layers = bundle.manifest.parts["backbone"].quantization.layers
    assert tuple(quantized_layers(load_graph(bundle, "backbone"))) == layers and len(layers) == 2 * 12 + 3 * 5
    assert quantized_layers(load_graph(bundle, "text_encoder_2")) == []


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0"),
        ("single_transformer_blocks.37.proj_out", "single_transformer_blocks.37"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3"),
        ("x_embedder", "x_embedder"),
    ],
)
def test_blocks(layer, block):
    assert block_of(layer) == block


def test_all_layers_left_out_is_the_reference(fp8, reference):
    """The operators and weights are the same; the numbers differ only by how ONNX Runtime fuses operators."""
    candidate, original = Bundle.open(fp8), Bundle.open(reference)
    stages = stages_of(original)
    text = stages.encode()
    batches = stages.batches(text, stages.modulation(text.pooled))
    trajectory = stages.generate(batches)
    weights = linears(load_graph(original, "backbone"))
    model = load_graph(candidate, "backbone")
    leave_out(model, quantized_layers(model), weights)
    assert not [n for n in model.graph if "Quantize" in n.op_type]
    assert not [v for v in model.graph.initializers if "scale" in v]
    (inputs,) = batches[0].inputs(0, trajectory.latents[0][batches[0].rows])
    heads = BlockEngine("backbone", model).run(inputs)
    np.testing.assert_allclose(heads["means"], trajectory.heads[0]["means"][batches[0].rows], rtol=1e-5, atol=1e-5)


def test_one_layer_left_out_keeps_its_neighbours_on_the_same_input(fp8, reference):
    """Queries, keys and values share one Q and DQ; leaving out one must not touch the others."""
    candidate = Bundle.open(fp8)
    name = "single_transformer_blocks.1.attn.to_q"
    model = load_graph(candidate, "backbone")
    before = set(quantized_layers(model))
    leave_out(model, [name], linears(load_graph(Bundle.open(reference), "backbone")))
    assert before - set(quantized_layers(model)) == {name}


def test_weights_outside_the_parts_own_file_are_refused(reference, tmp_path):
    root = shutil.copytree(reference, tmp_path / "bundle")
    model = onnx.load(root / "backbone.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "vae_decoder.safetensors"
    onnx.save(model, root / "backbone.onnx")
    message = r"must lie in the part's weights backbone\.safetensors, got 'vae_decoder\.safetensors'"
    with pytest.raises(BundleError, match=message):
        load_graph(dataclasses.replace(Bundle.open(reference), root=root), "backbone")


# Single layers.


def test_local_error_is_that_of_the_rounded_product(fp8, reference):
    """Against numpy: the reference's own activation, both operands rounded to E4M3 by ml_dtypes."""
    original, candidate = Bundle.open(reference), Bundle.open(fp8)
    name = "transformer_blocks.1.ff.net.2"
    stages = stages_of(original)
    text = stages.encode()
    (batch,) = stages.batches(text, stages.modulation(text.pooled))
    trajectory = stages.generate([batch])
    model = load_graph(original, "backbone")
    source = linears(model)[name].source
    source.name = "activation"
    model.graph.outputs.clear()
    model.graph.outputs.append(source)
    engine = BlockEngine("backbone", model)
    inputs = [engine.run(*batch.inputs(s, trajectory.latents[s]))["activation"] for s in range(2)]

    constants = load_graph(candidate, "backbone").graph.initializers
    scale, weight_scale, codes, weight = (
        v.const_value.numpy()
        for v in (
            *(constants[f"{name}.{suffix}"] for suffix in ("input_scale", "weight_scale", "weight")),
            load_graph(original, "backbone").graph.initializers[f"{name}.weight"],
        )
    )
    found = {d.layer: d for d in local_drift(original, candidate, CASES)}[name]
    for step, x in enumerate(inputs):
        rounded = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        got = rounded @ (codes.astype(np.float64) * weight_scale)
        # Sums of 256 float32 products are off by about 1e-6 of their size, against an error of 3e-2.
        expected = relative_error(got, x.astype(np.float64) @ weight).mean()
        assert found.errors[step] == pytest.approx(expected, rel=1e-3)
        assert found.reach[step] == pytest.approx(np.abs(x).max() / (448 * scale), rel=1e-5)
    # Calibrated by the largest input of these very cases; the scale is rounded up to a float32.
    assert max(found.reach) == pytest.approx(1, abs=1e-5)


def test_a_healthy_layer_is_far_from_the_limits(fp8, reference):
    for d in local_drift(Bundle.open(reference), Bundle.open(fp8), CASES):
        # Rounding to 3 mantissa bits is off by at most 2^-4, uniformly: 2^-4 / sqrt(3) = 0.036 at worst, twice.
        assert 0.005 < d.error < 0.051 and d.badness(OPEN) < 1, d


@pytest.mark.parametrize(
    ("layer", "constant", "factor", "threshold", "hint"),
    [
        pytest.param(
            *("single_transformer_blocks.1.proj_out", "input_scale", 30, "headroom", "the scale is too large"),
            marks=pytest.mark.slow,
        ),
        ("single_transformer_blocks.1.proj_out", "input_scale", 1 / 30, "layers", "the scale is too small"),
        pytest.param(
            *("transformer_blocks.0.attn.to_q", "input_scale", 1 / 30, "layers", "the scale is too small"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("transformer_blocks.1.attn.add_q_proj", "input_scale", 30, "headroom", "the scale is too large"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("single_transformer_blocks.2.attn.to_k", "weight_scale", 30, "layers", "look at the weight's scale"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_broken_scale_fails_by_its_layers_name_first(
    fp8, reference, prompts, tmp_path, capsys, layer, constant, factor, threshold, hint
):
    broken = edit_backbone(fp8, tmp_path / "broken", f"{layer}.{constant}", factor)
    check_named_first(broken, reference, prompts, tmp_path, capsys, layer, threshold, hint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "constant", "factor", "threshold", "hint"),
    [
        ("single_transformer_blocks.1.proj_out", "input_scale", 30, "headroom", "the scale is too large"),
        ("single_transformer_blocks.1.proj_mlp", "input_scale", 1 / 30, "layers", "the scale is too small"),
        ("transformer_blocks.0.ff.net.2", "weight_scale_2", 30, "layers", "look at the weight's scale"),
        ("transformer_blocks.1.ff_context.net.2", "weight_scale", 0.25, "layers", "look at the weight's scale"),
        ("transformer_blocks.0.attn.to_q", "input_scale", 1 / 30, "layers", "the scale is too small"),
    ],
)
def test_a_broken_scale_of_nvfp4_or_of_fp8_beside_it_too(
    nvfp4, reference, prompts, tmp_path, capsys, layer, constant, factor, threshold, hint
):
    broken = edit_backbone(nvfp4, tmp_path / "broken", f"{layer}.{constant}", factor)
    check_named_first(broken, reference, prompts, tmp_path, capsys, layer, threshold, hint)


@pytest.mark.slow
def test_a_healthy_layer_in_nvfp4_is_within_the_limits(nvfp4, reference):
    """Rounding to 1 mantissa bit is off by at most 2^-2, uniformly: 2^-2 / sqrt(3) = 0.144 at worst, twice: 0.204. Few
    numbers are at the lower end of their binade, so it stays within the limit for a layer, 0.2.
    """
    candidate = Bundle.open(nvfp4)
    q = candidate.manifest.parts["backbone"].quantization
    for d in local_drift(Bundle.open(reference), candidate, CASES):
        low, high = (0.03, 0.2) if q.format_of(d.layer) == "nvfp4" else (0.005, 0.051)
        assert low < d.error < high and d.badness(OPEN) <= 1, d
        assert max(d.reach) == pytest.approx(1, abs=1e-5)


def check_named_first(broken, reference, prompts, tmp_path, capsys, layer, threshold, hint):
    assert verify(broken, reference, "--prompts", prompts, "--json", tmp_path / "drift.json") == 1
    report = json.loads((tmp_path / "drift.json").read_text())
    first = report["breaches"][0]
    assert report["passed"] is False
    assert (first["layer"], first["threshold"]) == (layer, threshold) and hint in first["hint"]
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("FAILED: "))
    assert lines[start + 1].startswith(f"  {layer}: ") and f"({threshold}, " in lines[start + 1]
    assert lines[lines.index("worst layers") + 1].startswith(f"  {layer}: relative error ")
    assert f'      "{layer}",' in lines[lines.index("  exclude = [") :]


def drift_of(layer: str, error: float, reach: float = 1.0, scale: str | None = None) -> LayerDrift:
    return LayerDrift("backbone", layer, (error / 2, error), (reach / 2, reach), scale or layer)


def exactly(value: float) -> Interval:
    return Interval(value, value, value)


def test_gate_names_every_threshold_and_how_far_past_it_is():
    limits = Thresholds(heads=0.05, latents=0.1, psnr=30, judge=0.02)
    layers = [drift_of("a", 0.03), drift_of("b", 0.04), drift_of("c", 0.5)]
    breaches = gate.check(limits, layers, [exactly(0.02), exactly(0.2)], exactly(0.05), exactly(28.5), exactly(0.03))
    assert [b.threshold for b in breaches] == ["layers", "heads", "judge", "psnr"]
    assert [b.text() for b in breaches] == [
        "c: relative error of its output 0.5, must be at most 0.2 (layers, 2.5 times); its largest input is 1 of what "
        "its input scale can hold: look at the weight's scale",
        "relative error of the means at step 1 0.2, must be at most 0.05 (heads, 4 times)",
        "drop of the judge's share 0.03, must be at most 0.02 (judge, 1.5 times)",
        "PSNR of the images 28.50 dB, must be at least 30 dB (psnr)",
    ]
    assert [d.layer for d in gate.ranked(layers, limits)] == ["c", "b", "a"]
    within = [exactly(0.02), exactly(0.05)], exactly(0.1), exactly(30), exactly(0.02)
    assert gate.check(limits, layers[:2], *within) == ()
    anything = [exactly(9)], exactly(9), exactly(0), exactly(1)
    assert gate.check(Thresholds(), layers[:2], *anything) == (), "what a policy does not name is not enforced"


def test_gate_says_where_chance_may_be_the_cause():
    limits = Thresholds(heads=0.05, latents=0.1, psnr=30, judge=0.02)
    means = [Interval(0.06, 0.051, 0.07)], Interval(0.11, 0.09, 0.13), Interval(29, 27.5, 30.5), Interval(0.03, 0, 0.06)
    lines = {b.threshold: b.text() for b in gate.check(limits, [], *means)}
    assert lines["heads"].endswith("(heads, 1.2 times)"), "the whole interval is past the limit"
    assert lines["latents"].endswith("chance: 95 % interval 0.09 to 0.13; use more prompts")
    assert lines["psnr"].endswith("chance: 95 % interval 27.5 to 30.5; use more prompts")
    assert lines["judge"].endswith("chance: 95 % interval 0 to 0.06; use more prompts")


def test_numbers_that_are_none_fail():
    limits = Thresholds(heads=0.05, latents=0.05, psnr=25)
    breaches = gate.check(limits, [], [exactly(math.nan)], exactly(math.inf), exactly(math.nan), None)
    assert [b.threshold for b in breaches] == ["heads", "latents", "psnr"]


def test_layers_that_share_a_broken_scale_are_named_after_it():
    group = [drift_of(n, e, 12, "q") for n, e in (("q", 0.1), ("k", 0.5), ("v", 0.6))]
    breaches = gate.check(OPEN, [drift_of("x", 0.03), *group], [exactly(0)], exactly(0), exactly(50), None)
    assert [(b.layer, b.value) for b in breaches] == [("q", 0.6)]
    assert [d.layer for d in gate.ranked([drift_of("x", 0.3), *group], OPEN)] == ["q", "v", "k", "x"]


# Sensitivity.


def unit(name: str, gain: float) -> Unit:
    return Unit(name, (name,), Effect(0, gain), Effect(0, 0.1 - gain))


def choose(costs: dict[str, float], limit: float, broken=(), floor: float = 0.0):
    """Latent errors add up to the arithmetic's own; returns what is chosen and how many sets were tried."""
    tried = []

    def run(quantized):
        tried.append(set(quantized))
        return Effect(0, floor + sum(costs[n] for n in quantized))

    units = [unit(name, cost) for name, cost in costs.items()]
    whole = Effect(0, floor + sum(costs.values()))
    found = sensitivity._choose(units, set(broken), whole, run, list(costs), Thresholds(latents=limit))
    return None if found is None else [u.name for u in found], len(tried)


def test_the_fewest_units_are_left_out():
    costs = {"a": 0.02, "b": 0.05, "c": 0.01, "d": 0.02}
    assert choose(costs, 0.11) == ([], 0)
    assert choose(costs, 0.06)[0] == ["b"]
    assert choose(costs, 0.04)[0] == ["b", "a"]
    assert choose(costs, 0.1, floor=0.2)[0] is None, "the error is not in these layers"
    assert choose(costs, 0.11, broken=["c"])[0] == ["c"], "a broken scale is left out whatever it costs"


def test_a_unit_that_turns_out_not_to_matter_is_put_back():
    """ "b" gains most alone, but with "a" and "c" gone it is no longer needed."""
    layers = ["b", "a", "c"]
    units = [unit("b", 0.05), unit("a", 0.04), unit("c", 0.03)]

    def run(quantized):
        return Effect(0, 0.0 if not {"a", "c"} & set(quantized) else 0.2)

    found = sensitivity._choose(units, set(), Effect(0, 0.2), run, layers, Thresholds(latents=0.1))
    assert [u.name for u in found] == ["a", "c"]


@pytest.mark.slow
def test_sensitivity_of_blocks_suggests_a_policy_that_holds(fp8, reference, prompts, tmp_path, capsys):
    broken = edit_backbone(fp8, tmp_path / "broken", "single_transformer_blocks.1.proj_out.input_scale", 1 / 30)
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'name = "test"\nformat = "fp8_e4m3"\n[parts.backbone]\ninclude = ["*blocks*"]\n[thresholds]\nlatents = 0.1\n'
    )
    arguments = ["--prompts", prompts, "--policy", policy, "--sensitivity", "blocks", "--json", tmp_path / "drift.json"]
    assert verify(broken, reference, *arguments) == 1
    report = json.loads((tmp_path / "drift.json").read_text())
    found = report["sensitivity"]
    names = [u["name"] for u in found["units"]]
    assert sorted(names) == [
        *(f"single_transformer_blocks.{i}" for i in range(3)),
        *(f"transformer_blocks.{i}" for i in range(2)),
    ]
    assert names[0] == "single_transformer_blocks.1", "leaving out the broken block gains most"
    by_name = {u["name"]: u for u in found["units"]}
    worst = by_name["single_transformer_blocks.1"]
    assert worst["left_out"]["latents"] < 0.5 * found["whole"]["latents"]
    assert worst["alone"]["latents"] > 0.5 * found["whole"]["latents"]
    # The reference's operators and weights: only how ONNX Runtime fuses them may differ.
    assert found["none"]["heads"] < 1e-5 and found["none"]["latents"] < 1e-5
    assert report["exclude"] == {"backbone": found["exclude"]}
    assert found["exclude"] == ["single_transformer_blocks.1.*"]
    assert capsys.readouterr().out.endswith('  exclude = [\n      "single_transformer_blocks.1.*",\n  ]\n')


# Whole comparisons.


@pytest.mark.parametrize("family", ["flux-tiny", pytest.param("qwen-tiny", marks=pytest.mark.slow)])
def test_a_bundle_has_no_drift_from_itself(bundles, family, monkeypatch):
    """Every part is run twice; and with each run once, the report is the same."""
    ran: dict[str, list[int]] = {}

    def spy(name: str) -> None:
        real = getattr(BundleStages, name)

        def call(self, *arguments):
            ran.setdefault(name, []).append(id(self))
            return real(self, *arguments)

        monkeypatch.setattr(BundleStages, name, call)

    for name in ("encode", "use_backbone", "decode"):
        spy(name)
    bundle = Bundle.open(bundles(family))
    arguments = bundle, bundle, CASES, scene(bundle, 32, 64), DriftPlan("test", "test", OPEN)
    once, _ = compare(*arguments)
    # The candidate runs only its backbone, and decodes its own latents.
    assert {name: (len(ids), len(set(ids))) for name, ids in ran.items()} == {
        "encode": (1, 1),
        "use_backbone": (2, 2),
        "decode": (2, 2),
    }
    ran.clear()
    monkeypatch.setattr("arcflow_export.drift.compare_cases.same_parts", lambda *_: set())
    report, images = compare(*arguments)
    assert {name: (len(ids), len(set(ids))) for name, ids in ran.items()} == {
        "encode": (2, 2),
        "use_backbone": (2, 2),
        "decode": (3, 2),
    }
    assert once == report
    values = {m.name: m.interval.value for m in report.measures}
    assert values.pop("PSNR") == 100 and set(values.values()) == {0.0}
    assert np.array_equal(images.reference, images.candidate) and images.reference.shape == (3, 32, 64, 3)
    assert len(np.unique(images.reference)) > 10
    heads = [f"step {i} {head}" for i in range(2) for head in ("means", "logweights", "loggammas")]
    text = ["text states", "pooled text"] if family == "flux-tiny" else ["text states"]
    ends = ["step 0 latents", "step 1 latents", "GMSD"]
    assert list(values) == [*text, "modulation", *heads, "VAE image", *ends]
    assert report.passed and report.layers == ()


@pytest.mark.slow
def test_bfloat16_drifts_and_has_no_layers(command_run, reference, prompts, tmp_path, capsys):
    assert verify(command_run.bundle, reference, "--prompts", prompts, "--report", tmp_path / "report") == 0
    assert "PASSED" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "drift.json").read_text())
    assert report["notes"] == ["Timesteps, guidance and rotary tables of both bundles are rounded to bfloat16."]
    errors = {(m["what"], m["step"]): m["interval"]["value"] for m in report["measures"] if m["unit"].startswith("rel")}
    # One rounding to 8 bits is off by up to 2^-9; a few dozen operators in a row stay below ten times that.
    for what in ("text states", "modulation"):
        assert 2**-11 < errors[what, None] < 2**-9 * 10
    assert 2**-11 < errors["means", 0] < 2**-9 * 10
    assert report["layers"] == []
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["contact_sheet.png", "drift.json", "report.md"]


@pytest.mark.lengthy
@pytest.mark.slow
def test_fp8_of_the_shapes_model_draws_what_was_asked(bundles, tmp_path, capsys):
    reference = bundles("shapes", **SHAPES_OPTIONS)
    cases = read_cases("shapes", 16, 100)
    fp8 = make_fp8(reference, tmp_path / "fp8", cases, "shapes")
    # With fewer than 1,024 prompts chance decides: only a few prompts have a large error in the latents.
    arguments = ["--judge", SHAPES / "judge", "--report", tmp_path / "report"]
    assert verify(fp8, reference, *arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "drift.json").read_text())
    assert report["settings"]["count"] == 1024 and report["settings"]["policy"] == "shapes"
    assert report["thresholds"] | {"judge": 0.02, "psnr": 25.0} == report["thresholds"]
    named, right = report["judged"]["named"], report["judged"]["right"]
    assert named["reference"]["value"] > 0.9 and right["reference"]["value"] <= named["reference"]["value"]
    for share in (named, right):
        difference = share["candidate"]["value"] - share["reference"]["value"]
        assert share["difference"]["value"] == pytest.approx(difference) and difference >= -0.02


# Report and command.


def test_report(fp8, reference, prompts, tmp_path, capsys):
    out = tmp_path / "report"
    assert verify(fp8, reference, "--prompts", prompts, "--policy", "flux", "--report", out, "--limit", 2) in (0, 1)
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["contact_sheet.png", "drift.json", "drift.svg", "report.md"]
    report = json.loads((out / "drift.json").read_text())
    assert (report["format"], report["version"]) == ("arcflow-drift", 1)
    assert report["settings"]["count"] == 2 and report["settings"]["policy"] == "flux"
    assert len(report["layers"]) == 39 and all(len(d["errors"]) == 2 for d in report["layers"])
    text = (out / "report.md").read_text()
    assert "![Error of every quantised layer at each step.](drift.svg)" in text and "| PSNR" in text
    assert printed.splitlines()[0] in text
    svg = (out / "drift.svg").read_bytes()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 3 * 128
    # It is replaced by the next, and the same drift gives the same plot.
    assert verify(fp8, reference, "--prompts", prompts, "--report", out, "--limit", 2, "--json") in (0, 1)
    assert json.loads(capsys.readouterr().out)["settings"]["policy"] == "flux"
    assert (out / "drift.svg").read_bytes() == svg


@pytest.mark.slow
def test_a_report_that_cannot_be_finished_leaves_nothing(fp8, reference, tmp_path, monkeypatch):
    bundle = Bundle.open(reference)
    report, images = compare(Bundle.open(fp8), bundle, CASES[:1], scene(bundle), DriftPlan("test", "test", OPEN))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("arcflow_export.drift.figures.contact_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drift_folder.write_report(tmp_path / "report", report, ShownImages(("a",), images.reference, images.candidate))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_numbers_that_json_has_not_are_null(fp8, reference):
    bundle = Bundle.open(reference)
    report, _ = compare(Bundle.open(fp8), bundle, CASES[:1], scene(bundle), DriftPlan("test", "test", OPEN))
    bad = dataclasses.replace(report.measures[0], interval=mean(np.array([np.nan])))
    data = json.loads(drift_folder.as_json(dataclasses.replace(report, measures=(bad,))))
    assert data["measures"][0]["interval"] == {"value": None, "low": None, "high": None}


def test_thresholds_of_policies(tmp_path):
    assert load_policy("shapes").thresholds == Thresholds(heads=0.05, latents=0.05, psnr=25.0, judge=0.02)
    file = tmp_path / "mine.toml"
    head = 'name = "mine"\nformat = "fp8_e4m3"\n[parts.backbone]\ninclude = ["*"]\n'
    file.write_text(f"{head}[thresholds]\nlayers = 0.1\nheadroom = 20\n")
    assert load_policy(str(file)).thresholds == Thresholds(layers=0.1, headroom=20.0)
    file.write_text(head)
    assert load_policy(str(file)).thresholds == Thresholds(layers=0.2, headroom=8.0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--adapter", "x"], 2, "--adapter cannot be used with --against; leave one or the other out"),
        (["--prompt", "x"], 2, "--prompt cannot be used with --against; leave one or the other out"),
        (["--limit", "0"], 2, "--limit must be at least 1, got 0"),
        (["--seed", "-1", "--limit", "1"], 2, "--seed must be between 0 and 2**32 - 1, got -1"),
        (["--policy", "flix"], 1, "did you mean 'flux'?"),
        (["--prompts", "missing.txt"], 1, "missing.txt"),
        (["--report", "missing/report"], 1, "missing is not a directory; create it first"),
        (["--judge", str(SHAPES / "judge"), "--prompts", "general"], 2, "--judge needs --prompts shapes"),
        (["--judge", str(SHAPES / "judge"), "--height", "32"], 2, "--judge reads images of 64x64, got 64x32"),
    ],
)
def test_bad_arguments(fp8, reference, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert verify(fp8, reference, *arguments) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_against_base_and_adapter_are_needed(reference, capsys):
    assert cli.main(["verify", str(reference), "--base", str(GOLDEN / "flux-tiny" / "base")]) == 2
    assert "give --adapter, or --against BUNDLE to compare with another bundle" in capsys.readouterr().err
    sources = ["--base", "x", "--adapter", "y"]
    assert cli.main(["verify", str(reference), *sources, "--report", "z"]) == 2
    assert "--report cannot be used without --against; add --against BUNDLE or leave it out" in capsys.readouterr().err
    assert cli.main(["verify", str(reference), *sources, "--json", "z"]) == 2
    assert "--json takes a file only with --against, got 'z'; redirect stdout instead" in capsys.readouterr().err


def test_a_folder_that_is_no_report_is_not_overwritten(fp8, reference, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert verify(fp8, reference, "--report", tmp_path / "mine") == 1
    assert "exists and is not a drift report; it will not be overwritten, give another name" in capsys.readouterr().err


def test_cases():
    drawn = read_cases("shapes", 4, 7)
    assert [c.seed for c in drawn] == [7, 8, 9, 10] and all(c.words for c in drawn)
    assert [c.seed for c in read_cases("general", 2, 5)] == [5, 6]
    assert len(read_cases("shapes", 1, 0)) == 1
    with pytest.raises(RequestError, match="--limit"):
        read_cases("general", 0, 0)


def test_graph_constants_of_bfloat16_scales_are_read(tmp_path):
    """A scale in bfloat16 is read as the number it is."""
    array = np.array(0.05, ml_dtypes.bfloat16)
    x = ir.Value(name="x", shape=ir.Shape([1, 2]), type=ir.TensorType(ir.DataType.BFLOAT16))
    scale, zero, weight = (
        ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.tensor(a).dtype), const_value=ir.tensor(a))
        for n, a in (
            ("l.input_scale", array),
            ("zero", np.zeros((), ml_dtypes.float8_e4m3fn)),
            ("l.weight", np.zeros((2, 2), ml_dtypes.bfloat16)),
        )
    )
    q = ir.node("QuantizeLinear", [x, scale, zero])
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale])
    matmul = ir.node("MatMul", [dq.outputs[0], weight], name="l")
    graph = ir.Graph([x], [matmul.outputs[0]], nodes=[q, dq, matmul], initializers=[scale, zero, weight])
    (linear,) = linears(ir.Model(graph, ir_version=10)).values()
    assert (linear.name, linear.scale, linear.scale_name) == ("l", float(array), "l.input_scale")
    assert linear.source is x and linear.quantized


@pytest.mark.slow
def test_fp8_in_bfloat16_arithmetic_is_measured_against_float32(command_run, reference, tmp_path):
    """As engines run it, bfloat16 activations and scales around E4M3 products, compared with float32."""
    fp8 = make_fp8(command_run.bundle, tmp_path / "fp8", CASES)
    candidate, original = Bundle.open(fp8), Bundle.open(reference)
    drift = local_drift(original, candidate, CASES)
    layers = candidate.manifest.parts["backbone"].quantization.layers
    assert tuple(d.layer for d in drift) == layers
    for d in drift:
        # As in float32, and a few roundings to 8 bits on top.
        assert 0.005 < d.error < 0.055 and d.badness(OPEN) < 1, d
        assert max(d.reach) == pytest.approx(1, abs=0.05), "scales are from the same cases in bfloat16"
    report, _ = compare(candidate, original, CASES[:1], scene(original), DriftPlan("test", "test", OPEN))
    assert report.passed and len(report.layers) == len(layers)
