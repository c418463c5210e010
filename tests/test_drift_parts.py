"""What the drift gate measures of each part, on bundles whose weights were changed so that the error is known by hand.

Two bundles of one graph differ in a few weights. A part whose last layer gives f times as much has the relative error
|f - 1|; whole images are compared with those that two independent pipelines generate.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from arcflow_export.drift import compare as compare_module
from arcflow_export.drift import sensitivity
from arcflow_export.drift import stages as stages_module
from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.drift.comparable import check_comparable, same_parts
from arcflow_export.drift.compare import DriftPlan, compare
from arcflow_export.drift.compare_cases import CaseErrors, compare_cases
from arcflow_export.drift.stages import BundleStages
from arcflow_export.errors import ExportError
from arcflow_export.formats.thresholds import Thresholds
from arcflow_runtime import Pipeline
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.generate.text import PromptTokenizer
from tests.fake_bundle import list_files, write_manifest

#: Prompts of unlike words and other seeds than their places; the first comes twice.
CASES = (
    DriftCase("a red circle", 4),
    DriftCase("two blue cats", 7),
    DriftCase("an old sailor", 5),
    DriftCase("a red circle", 6),
)
#: No field has a default's value.
SCENE = ImageSettings(height_px=32, width_px=48, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=12)
HEADS = ("means", "logweights", "loggammas")
#: A sum in another order: some units of 2^-24 in every layer.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def reference(bundles) -> Bundle:
    return Bundle.open(bundles("flux-tiny"))


def change(bundle: Bundle, out: Path, part: str, tensors: dict[str, float], rows: int | None = None) -> Bundle:
    """A copy in which weights are multiplied where they lie, or just row `rows` of them; the graphs' bytes stay."""
    shutil.copytree(bundle.root, out)
    path = out / bundle.manifest.parts[part].weights
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    for name, factor in tensors.items():
        first, last = header[name]["data_offsets"]
        array = np.frombuffer(data, np.float32, (last - first) // 4, begin + first).reshape(header[name]["shape"])
        chosen = array if rows is None else array[rows]
        chosen *= factor
    path.write_bytes(data)
    write_manifest(out, dataclasses.replace(bundle.manifest, files=list_files(out)))
    return Bundle.open(out)


def linear(name: str, factor: float) -> dict[str, float]:
    return {f"{name}.weight": factor, f"{name}.bias": factor}


@pytest.fixture(scope="module")
def changed(reference, tmp_path_factory):
    """A function part -> a bundle in which that part alone was changed."""
    tensors = {
        "text_encoder": linear("text_model.final_layer_norm", 3.0),
        "text_encoder_2": {"encoder.final_layer_norm.weight": -2.0},
        "conditioner": linear("norm_out.linear", 4.0),
        "backbone": linear("proj_out_means", 1.5)
        | linear("proj_out_logweights", 3.0)
        | linear("proj_out_loggamma", 1.25),
        "vae_decoder": linear("decoder.conv_out", 0.0),
    }
    made: dict[str, Bundle] = {}

    def get(part: str) -> Bundle:
        if part not in made:
            made[part] = change(reference, tmp_path_factory.mktemp(part) / "bundle", part, tensors[part])
        return made[part]

    return get


def errors_of(candidate: Bundle, reference: Bundle, cases=CASES, scene=SCENE, engines=None) -> CaseErrors:
    return compare_cases(candidate, reference, cases, scene, (), engines, lambda *_: None)


def by_name(found: CaseErrors) -> dict[tuple[str, int | None], np.ndarray]:
    return {(q.what, q.step): values for q, values in found.values.items()}


@pytest.fixture(scope="module")
def generated():
    """A function bundle -> what its own pipeline generates: latents after every step [S, n, N, C] and images."""
    made: dict[Path, tuple[np.ndarray, np.ndarray]] = {}

    def get(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
        if bundle.root not in made:
            latents, images = [], []
            with Pipeline.load(bundle.root) as pipe:
                for case in CASES:
                    steps: list[np.ndarray] = []
                    out = pipe(
                        case.prompt,
                        SCENE.height_px,
                        SCENE.width_px,
                        SCENE.num_inference_steps,
                        SCENE.guidance_scale,
                        case.seed,
                        max_sequence_length=SCENE.max_sequence_length,
                        callback_on_step_end=lambda _, x, steps=steps: steps.append(x.copy()),
                    )
                    latents.append(np.concatenate(steps))
                    images.append(np.asarray(out.images[0]))
            made[bundle.root] = np.stack(latents, 1), np.stack(images)
        return made[bundle.root]

    return get


def rms_ratio(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each row, written down once more in float64."""
    pairs = zip(got.astype(np.float64), reference.astype(np.float64), strict=True)
    return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])


def psnr(got: np.ndarray, reference: np.ndarray) -> np.ndarray:
    pairs = zip(got.astype(np.float64), reference.astype(np.float64), strict=True)
    return np.array([10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in pairs])


def room_db(got: np.ndarray, reference: np.ndarray, levels: int) -> float:
    """How far a PSNR may be off where every pixel's difference is off by up to `levels`; at most d -> d + levels."""
    least = min(np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(got.astype(float), reference.astype(float), strict=True))
    return 20 * float(np.log10(1 + levels / least))


def test_parts_of_one_graph_and_other_weights_are_other_parts(reference, changed):
    parts = set(reference.manifest.parts)
    for part in parts:
        assert same_parts(changed(part), reference) == same_parts(reference, changed(part)) == parts - {part}
    graphs = {f for p in reference.manifest.parts.values() for f in (p.graph,)}
    assert all(changed(p).manifest.files[g] == reference.manifest.files[g] for p in parts for g in graphs)


def test_parts_of_one_name_and_another_graph_are_other_parts(reference, tmp_path):
    shutil.copytree(reference.root, tmp_path / "b")
    path = tmp_path / "b" / reference.manifest.parts["conditioner"].graph
    path.write_bytes(path.read_bytes() + b"\x32\x00")  # an empty doc_string: the same model in other bytes
    write_manifest(tmp_path / "b", dataclasses.replace(reference.manifest, files=list_files(tmp_path / "b")))
    other = Bundle.open(tmp_path / "b")
    assert same_parts(other, reference) == set(reference.manifest.parts) - {"conditioner"}


#: What is measured of each part on the reference's own inputs, where it alone is changed: 0 everywhere else.
EXPECTED = {
    "text_encoder": {("pooled text", None): 2.0},
    "text_encoder_2": {("text states", None): 3.0},
    "backbone": {(h, s): e for h, e in zip(HEADS, (0.5, 2.0, 0.25), strict=True) for s in range(3)},
}


@pytest.mark.parametrize("part", EXPECTED)
def test_the_error_of_a_changed_part_is_known_and_the_others_have_none(part, reference, changed, generated):
    """And whole images are those that two pipelines generate by themselves."""
    found = errors_of(changed(part), reference)
    values = by_name(found)
    for (what, step), value in values.items():
        group = next(q.group for q in found.values if (q.what, q.step) == (what, step))
        if group == "parts":
            assert value == pytest.approx(EXPECTED[part].get((what, step), 0.0), abs=1e-6), (what, step)
    ours, theirs = generated(changed(part)), generated(reference)
    for step in range(3):
        expected = rms_ratio(ours[0][step], theirs[0][step])
        assert (expected > 100 * ROUNDING).all(), "the change is seen in the latents"
        assert values["latents", step] == pytest.approx(expected, rel=1e-3, abs=3 * ROUNDING)
    # A value near a rounding border is one level of 8 bits off.
    assert np.abs(found.reference.astype(int) - theirs[1]).max() <= 1
    assert np.abs(found.candidate.astype(int) - ours[1]).max() <= 1
    assert values["PSNR", None] == pytest.approx(psnr(found.candidate, found.reference))
    assert (values["PSNR", None] < 60).all()


def test_only_the_conditioner_changed(reference, changed, generated):
    """The last layer's part of the modulation is four times as large, and the rest is unchanged."""
    candidate = changed("conditioner")
    values = by_name(errors_of(candidate, reference))
    assert (values["modulation", None] > 0.01).all() and (values["modulation", None] < 3).all()
    for name in HEADS:
        assert all((values[name, step] == 0).all() for step in range(3)), "the backbone gets the reference's"
    assert (values["text states", None] == 0).all() and (values["pooled text", None] == 0).all()
    for step in range(3):
        expected = rms_ratio(generated(candidate)[0][step], generated(reference)[0][step])
        assert (expected > 100 * ROUNDING).all()
        assert values["latents", step] == pytest.approx(expected, rel=1e-3, abs=3 * ROUNDING)


def test_only_the_decoder_changed(reference, changed, generated):
    """Its last convolution gives 0, which is a grey of 127 or 128 everywhere."""
    values = by_name(errors_of(changed("vae_decoder"), reference))
    (grey,) = np.unique(generated(changed("vae_decoder"))[1])
    assert grey in (127, 128)
    images = generated(reference)[1]
    # A pixel of the reference may be off by one level of 8 bits, in both norms of the ratio.
    room = 2 / np.sqrt(np.mean(images.astype(float) ** 2))
    flat = np.full_like(images, grey)
    assert room < 0.03 and values["VAE image", None] == pytest.approx(rms_ratio(flat, images), abs=room)
    assert values["PSNR", None] == pytest.approx(psnr(flat, images), abs=room_db(flat, images, 1))
    assert (values["GMSD", None] > 0.01).all()
    rest = {k: v for k, v in values.items() if k[0] not in ("VAE image", "PSNR", "GMSD")}
    assert all((v == 0).all() for v in rest.values()), "nothing before the decoder differs"


def test_an_error_is_that_of_its_own_prompt(reference, tmp_path):
    """One word of one prompt has another embedding: no other prompt has any error, in whatever batch it was."""
    tokenizer = PromptTokenizer(reference)
    ids = [set(tokenizer.tokenize(c.prompt, 12).ids["text_encoder_2"].flatten().tolist()) for c in CASES]
    (token, *_) = ids[1] - ids[0] - ids[2]
    candidate = change(reference, tmp_path / "b", "text_encoder_2", {"shared.weight": -2.0}, rows=token)
    values = by_name(errors_of(candidate, reference))
    for what in (("text states", None), ("latents", 0), ("latents", 2)):
        assert values[what][1] > 1e-3 and values[what][[0, 2, 3]].tolist() == [0, 0, 0], what
    assert values["PSNR", None][1] < 100 and values["PSNR", None][[0, 2, 3]].tolist() == [100] * 3


@pytest.mark.slow
def test_the_gate_fails_by_the_last_step_and_the_prompts_mean(reference, changed):
    """Only T5 changed: the limit between the errors of two steps is passed by the last step's alone."""
    candidate = changed("text_encoder_2")
    values = by_name(errors_of(candidate, reference))
    last, first = (float(values["latents", step].mean()) for step in (2, 0))
    assert last != pytest.approx(first, rel=0.01)
    limit = (first + last) / 2
    report, shown = compare(candidate, reference, CASES, SCENE, DriftPlan("p", "q", Thresholds(latents=limit)))
    assert [b.value for b in report.breaches] == ([pytest.approx(last)] if last > first else [])
    measured = {(m.what, m.step): m.interval for m in report.measures}
    assert all(i.low <= i.value <= i.high for i in measured.values())
    assert measured["text states", None].value == pytest.approx(3.0)
    for key, value in values.items():
        assert measured[key].value == pytest.approx(value.mean()), key
    assert (report.settings["count"], report.settings["seed"]) == (4, 4)
    assert [report.settings[f.name] for f in dataclasses.fields(SCENE)] == list(dataclasses.astuple(SCENE))
    assert shown.prompts == tuple(c.prompt for c in CASES)


@pytest.mark.slow
def test_cases_compared_apart_give_the_same_report(reference, changed, monkeypatch):
    """With memory for three cases of four at a time: the batches are others, so rounding may differ."""
    arguments = changed("backbone"), reference, CASES, SCENE, DriftPlan("p", "q", Thresholds(heads=0.1))
    whole, pictures = compare(*arguments)
    monkeypatch.setattr(compare_module, "KEPT_BYTES", 3 * compare_module._case_bytes(reference, SCENE))
    seen = []
    report, shown = compare(*arguments, progress=lambda stage, done, total: seen.append(stage))
    assert [m.name for m in report.measures] == [m.name for m in whole.measures]
    for a, b in zip(report.measures, whole.measures, strict=True):
        # A level of 8 bits more or less in some pixels is all that an image may differ by.
        room = 0.05 if a.unit == "dB" else 3 * ROUNDING + (1e-3 if a.what == "GMSD" else 0)
        assert dataclasses.astuple(a.interval) == pytest.approx(dataclasses.astuple(b.interval), rel=0, abs=room)
    assert shown.prompts == pictures.prompts
    assert np.abs(shown.candidate.astype(int) - pictures.candidate).max() <= 1
    texts = [s for s in dict.fromkeys(seen) if s.startswith("text, ")]
    assert texts == ["text, prompts 1 to 3 of 4", "text, prompts 4 to 4 of 4"]


def test_bytes_kept_of_a_case_by_hand(reference):
    """32 x 48 pixels are 6 tokens of 64 channels: heads [6, 16, 64], [6, 16, 4] and [6, 15, 4] for 3 steps and 2 more,
    two text states [12, 64] and two images, in float32, but for the images' bytes.
    """
    heads, states, images = 6 * (16 * 64 + 31 * 4), 12 * 64, 32 * 48 * 3
    least = 4 * (5 * heads + 2 * states) + 2 * images
    one = compare_module._case_bytes(reference, SCENE)
    assert least <= one, "what passes between pieces comes on top"
    larger = compare_module._case_bytes(reference, dataclasses.replace(SCENE, num_inference_steps=4))
    assert larger - one == 4 * heads
    assert compare_module.kept_bytes(reference, SCENE, 3) == 3 * one


class ZeroThenNothing:
    """In place of engines: latents of 0 after two steps and NaN after the third, and black images."""

    def generate(self, cases):
        zeros = np.zeros((len(cases), 6, 64), np.float32)
        return [zeros, zeros, np.full_like(zeros, np.nan)], np.zeros((len(cases), 32, 48, 3), np.uint8)


def test_engines_are_measured_in_place_of_the_graphs(reference, changed, generated):
    """Latents of 0 have the relative error 1, NaN an infinite one; parts are still measured with the graphs."""
    values = by_name(errors_of(changed("backbone"), reference, engines=ZeroThenNothing()))
    assert values["latents", 0].tolist() == values["latents", 1].tolist() == [1.0] * 4
    assert np.isinf(values["latents", 2]).all()
    assert values["means", 2] == pytest.approx(0.5)
    images = generated(reference)[1]
    black = np.zeros_like(images)
    assert values["PSNR", None] == pytest.approx(psnr(black, images), abs=room_db(black, images, 1))
    assert values["VAE image", None].tolist() == [0] * 4


def test_texts_of_several_lengths_keep_their_order(bundles, monkeypatch):
    """Qwen-Image's prompts run by text length, two images at a time; each gets what its own pipeline gives it."""
    bundle = Bundle.open(bundles("qwen-tiny"))
    cases = tuple(DriftCase(p, 10 + i) for i, p in enumerate(("aa", "bbbb", "cc", "dddd", "ee")))
    size = ImageSettings(32, 32, 2, None, 256)
    monkeypatch.setattr(stages_module, "_BATCH_TOKENS", 2 * 4)
    stages = BundleStages(bundle, cases, size, bundle.manifest.reference_dtype)
    text = stages.encode()
    batches = stages.batches(text, stages.modulation(text.pooled))
    assert [b.rows for b in batches] == [[0, 2], [4], [1, 3]]
    trajectory = stages.generate(batches)
    images = stages.decode(trajectory.latents[-1])
    with Pipeline.load(bundle.root) as pipe:
        for i, case in enumerate(cases):
            out = pipe(case.prompt, 32, 32, 2, seed=case.seed, max_sequence_length=256, output_type="latents").images
            np.testing.assert_allclose(trajectory.latents[-1][i], out[0], atol=ROUNDING * np.abs(out).max())
            image = np.asarray(pipe(case.prompt, 32, 32, 2, seed=case.seed, max_sequence_length=256).images[0])
            assert np.abs(images[i].astype(int) - image).max() <= 1


def test_each_field_of_the_student_must_be_the_same(reference):
    """One field at a time: with another value of it the same request is another image."""
    m = reference.manifest
    other = {
        "family": "qwen-image",
        "latents": dataclasses.replace(m.latents, num_gaussians=3),
        "schedule": dataclasses.replace(m.schedule, timestep_ratio=0.5),
        "rotary": dataclasses.replace(m.rotary, theta=1.0),
        "text": dataclasses.replace(m.text, clip_tokens=76),
        "guidance": not m.guidance,
    }
    for key, value in other.items():
        candidate = dataclasses.replace(reference, manifest=dataclasses.replace(m, **{key: value}))
        with pytest.raises(ExportError, match=f"are not of the same student: {key} "):
            check_comparable(candidate, reference)
    tokenizers = dict(m.tokenizers, tokenizer=m.tokenizers["tokenizer_2"])
    candidate = dataclasses.replace(reference, manifest=dataclasses.replace(m, tokenizers=tokenizers))
    with pytest.raises(ExportError, match=r"student: tokenizer \(its file\)"):
        check_comparable(candidate, reference)
    same = {"opset": 20, "dtype": "bfloat16"}
    check_comparable(dataclasses.replace(reference, manifest=dataclasses.replace(m, **same)), reference)


def test_sensitivity_is_measured_on_cases_spread_over_all(reference, monkeypatch):
    taken = []

    def stop(*arguments):
        taken.extend(arguments[2].cases)

    monkeypatch.setattr(compare_module, "measure_sensitivity", stop)
    monkeypatch.setattr(compare_module, "PROMPTS", 2)
    layers = [compare_module.LayerDrift("backbone", "x", (0.1,), None)]
    plan = DriftPlan("p", "q", Thresholds(), sensitivity="blocks")
    compare_module._sensitivity(reference, reference, CASES, SCENE, layers, plan, lambda *_: None)
    assert taken == [CASES[0], CASES[2]]
    assert sensitivity.PROMPTS == 32
