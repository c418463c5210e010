"""Which prompts a calibration draws together, from what noise and at which step, and its state: by hand, with fakes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import golden_student

pytest.importorskip("modelopt", reason="needs the extra 'calibrate'")

from arcflow_calibration.collect import (
    CalibratedLayer,
    PromptBatch,
    _equal_lengths,
    _range,
    generate_batch,
    guidance,
    plan_batches,
)
from arcflow_calibration.options import CalibrationSettings
from arcflow_calibration.ranges import BINS, make_calibrator
from arcflow_calibration.state import check_state, load_state, save_state, settings_of
from arcflow_export.errors import CalibrationError
from arcflow_export.formats.prompts import Prompts
from arcflow_export.formats.scales import ActivationRange
from arcflow_export.student.reference import integrate
from arcflow_runtime.disk.manifest import Schedule

PROMPTS = Prompts("test", ("a", "b", "c", "d", "e"))
STEPPED, TEXT = "backbone", "text_encoder_2"


def test_prompts_take_sizes_in_turn_and_are_cut_by_size():
    settings = CalibrationSettings(sizes=((32, 64), (64, 32)), batch=2)
    assert plan_batches(PROMPTS, settings) == [
        PromptBatch(((0, "a"), (2, "c")), 32, 64),
        PromptBatch(((4, "e"),), 32, 64),
        PromptBatch(((1, "b"), (3, "d")), 64, 32),
    ]


def test_texts_of_one_length_are_drawn_together():
    assert _equal_lengths([3, 5, 3, 4, 5]) == [[0, 2], [1, 4], [3]]


class FakeStudent:
    """States as long as the text, and heads of one mode whose mean is 2."""

    device = torch.device("cpu")
    transformer = SimpleNamespace(config=SimpleNamespace(in_channels=64))

    def __init__(self, on, pooled=True):
        self._on, self._pooled = on, pooled
        self.seen: list[tuple] = []

    def encode_batch(self, texts, length):
        assert length == 24
        self._on.texts += [(text, self._on.step) for text in texts]
        return [
            (
                torch.full((1, len(t), 2), float(ord(t[0]))),
                torch.full((1, 3), float(ord(t[0]))) if self._pooled else None,
            )
            for t in texts
        ]

    def schedule(self, steps, height, width):
        """Equal steps of t from 1 to 0, and sigma(t) = 3.2 t / (1 + 2.2 t)."""
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return 3.2 * t / (1 + 2.2 * t)

    def predict(self, x, sigma, states, pooled, height, width, guidance_scale):
        self.seen.append((self._on.step, x, float(sigma), states, pooled, (height, width, guidance_scale)))
        b, n, c = x.shape
        return torch.full((b, n, 1, c), 2.0), torch.zeros(b, n, 1, 4), torch.zeros(b, n, 0, 4)

    def step(self, x, heads, start, end):
        return integrate(x, *heads, start, end)


def test_noise_steps_and_sizes_of_a_batch():
    """Prompt i has the noise of seed + i wherever it is; steps are told before the network is called."""
    on = SimpleNamespace(parts={STEPPED: {}}, step=0, texts=[])
    student = FakeStudent(on)
    batch = PromptBatch(((1, "aa"), (4, "b"), (6, "cc")), 32, 48)
    settings = CalibrationSettings(seed=100, num_inference_steps=2, max_sequence_length=24)
    generate_batch(student, batch, settings, 2.5, on)
    assert on.step == 0 and [t for t, _ in on.texts] == ["aa", "b", "cc"]
    noise = [torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(100 + i)) for i in (1, 4, 6)]
    packed = [n.view(16, 2, 2, 3, 2).permute(1, 3, 0, 2, 4).reshape(6, 64) for n in noise]
    rows = [[0, 2], [0, 2], [1], [1]]
    sigmas = [1.0, 3.2 / 4.2]
    for i, (step, x, sigma, states, pooled, size) in enumerate(student.seen):
        assert step == i % 2 and sigma == pytest.approx(sigmas[step]) and size == (32, 48, 2.5)
        expected = torch.stack([packed[r] for r in rows[i]]) - (2 * (1 - sigmas[1]) if step else 0)
        torch.testing.assert_close(x, expected)
        letters = [float(ord(batch.prompts[r][1][0])) for r in rows[i]]
        assert states[:, 0, 0].tolist() == pooled[:, 0].tolist() == letters
    assert len(student.seen) == 4


def test_a_student_without_guidance_or_pooled_text():
    on = SimpleNamespace(parts={STEPPED: {}}, step=0, texts=[])
    student = FakeStudent(on, pooled=False)
    settings = CalibrationSettings(num_inference_steps=3, max_sequence_length=24)
    generate_batch(student, PromptBatch(((0, "a"),), 32, 32), settings, None, on)
    assert [step for step, *_ in student.seen] == [0, 1, 2]
    # Each step moves by 2 for each unit of sigma: 3.2 t / (1 + 2.2 t) at t = 1, 2/3 and 1/3.
    sigmas = [1.0, 3.2 * 2 / (3 + 4.4), 3.2 / (3 + 2.2)]
    assert [sigma for _, _, sigma, *_ in student.seen] == pytest.approx(sigmas)
    start = student.seen[0][1]
    for (_, x, *_), sigma in zip(student.seen, sigmas, strict=True):
        torch.testing.assert_close(x, start - 2 * (1 - sigma))
    assert {(pooled, size) for *_, pooled, size in student.seen} == {(None, (32, 32, 3.5))}


class FakeTeacher(FakeStudent):
    """A straight student whose velocity is (1, 0, ...) for states of "n" and (0, 1, 0, ...) for others."""

    def predict(self, x, sigma, states, pooled, height, width, guidance_scale):
        self.seen.append((self._on.step, x, states, pooled))
        v = torch.zeros_like(x)
        v[..., 0 if float(states[0, 0, 0]) == ord("n") else 1] = 1.0
        return (v,)

    def step(self, x, heads, start, end):
        return x - (start - end) * heads[0]


def test_a_negative_prompt_takes_a_second_call_in_each_step():
    """Prompts take the negative prompts in turn, and calls have texts of one length; the guided step is by hand."""
    on = SimpleNamespace(parts={STEPPED: {}}, step=0, texts=[])
    student = FakeTeacher(on, pooled=False)
    settings = CalibrationSettings(
        num_inference_steps=2, max_sequence_length=24, negative_prompts=("n", "nn"), true_cfg_scale=3.0
    )
    batch = PromptBatch(((0, "a"), (1, "b"), (2, "c")), 32, 32)
    generate_batch(student, batch, settings, None, on)
    # Each text is encoded once.
    assert [text for text, _ in on.texts] == ["a", "b", "c", "n", "nn"]
    shapes = [(step, tuple(states.shape[:2])) for step, _, states, _ in student.seen]
    # Prompts 0 and 2 share a negative prompt and so their calls.
    pair, alone = [(2, 1), (2, 1)], [(1, 1), (1, 2)]
    assert shapes == [(s, shape) for rows in (pair, alone) for s in (0, 1) for shape in rows]
    start, after = student.seen[0][1], student.seen[2][1]
    # 3 v - 2 n = (-2, 3), of length sqrt(13), is given the length of v, which is 1.
    sigma = 3.2 / 4.2
    moved = torch.zeros_like(start)
    moved[..., 0], moved[..., 1] = -2 / 13**0.5, 3 / 13**0.5
    torch.testing.assert_close(after, start - (1 - sigma) * moved)


def test_text_encoders_alone_draw_nothing():
    on = SimpleNamespace(parts={TEXT: {}}, step=0, texts=[])
    student = FakeStudent(on)
    generate_batch(student, PromptBatch(((0, "a"),), 32, 32), CalibrationSettings(max_sequence_length=24), None, on)
    assert on.texts == [("a", 0)] and student.seen == []


def test_guidance_is_the_given_one_or_3_5():
    flux = golden_student("flux-tiny")
    assert (
        guidance(flux, CalibrationSettings()) == 3.5 and guidance(flux, CalibrationSettings(guidance_scale=2.0)) == 2.0
    )
    assert guidance(golden_student("qwen-tiny"), CalibrationSettings()) is None


# Ranges.


def layer(name: str, steps: int, method="max") -> CalibratedLayer:
    percentile = 50.0 if method == "percentile" else None
    calibrators = [make_calibrator(name, method, percentile) for _ in range(steps)]
    return CalibratedLayer(name, None, None, calibrators, [0.0] * steps, [0] * steps)


def test_a_range_by_hand():
    found = layer("x", 2)
    for calibrator, values in zip(found.calibrators, ([-3.0, 2.0], [0.5, 1.0]), strict=True):
        calibrator.collect(torch.tensor(values))
    found.calibrators[0].collect(torch.tensor([1.0]))
    found.output_peaks[:], found.samples[:] = [7.0, 6.0], [5, 5]
    assert _range(STEPPED, found) == ActivationRange((3.0, 1.0), 5, (7.0, 6.0))


@pytest.mark.parametrize(("samples", "said"), [([4, 4], "saw only zeros"), ([4, 0], "was never called")])
def test_a_step_without_a_range_is_named(samples, said):
    found = layer("x", 2)
    found.calibrators[0].collect(torch.tensor([1.0]))
    found.samples[:] = samples
    with pytest.raises(CalibrationError, match=f"backbone: x {said} at step 1"):
        _range(STEPPED, found)


def test_a_percentile_by_hand():
    """Half of eight numbers are at most the fourth: the upper edge of its bin is given, within a bin's width of it."""
    calibrator = make_calibrator("x", "percentile", 50.0)
    calibrator.collect(-torch.tensor([1.0, 2.0, 3.0, 4.001, 5.001, 6.0, 7.0, 8.0]))
    assert calibrator.span == calibrator.peak == 8.0
    assert 4.001 < calibrator.amax() < 4.001 + 8 / BINS
    calibrator.collect(torch.tensor([20.0]))  # the span doubles twice: 8, 16, 32
    assert (calibrator.span, calibrator.peak, int(calibrator.counts.sum())) == (32.0, 20.0, 9)
    assert 5.001 < calibrator.amax() < 5.001 + 32 / BINS


# The state.


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_a_state_puts_every_number_back_in_its_place(method, tmp_path):
    """Two parts, three layers and two steps, each with numbers of its own."""

    def collector(filled: bool):
        parts = {
            STEPPED: {n: layer(n, 2, method) for n in ("a", "b")},
            TEXT: {"c": layer("c", 1, method)},
        }
        if filled:
            number = 1
            for layers in parts.values():
                for found in layers.values():
                    for step, calibrator in enumerate(found.calibrators):
                        calibrator.collect(torch.tensor([float(number), 0.25]))
                        found.output_peaks[step], found.samples[step] = 100.0 + number, 1000 + number
                        number += 1
        return SimpleNamespace(parts=parts)

    settings = {"method": method}
    before, after = collector(True), collector(False)
    save_state(tmp_path / "s", before, settings, 7)
    assert load_state(tmp_path / "s", after, settings) == 7
    peaks = []
    for part, layers in before.parts.items():
        for name, found in layers.items():
            other = after.parts[part][name]
            assert (other.output_peaks, other.samples) == (found.output_peaks, found.samples)
            for ours, theirs in zip(found.calibrators, other.calibrators, strict=True):
                assert (ours.peak, ours.span) == (theirs.peak, theirs.span)
                assert ours.amax() == theirs.amax()
                assert (ours.counts is None and theirs.counts is None) or torch.equal(ours.counts, theirs.counts)
                peaks.append(theirs.peak)
    assert peaks == [1.0, 2.0, 3.0, 4.0, 5.0]
    renamed = collector(False)
    renamed.parts[TEXT] = {"d": renamed.parts[TEXT]["c"]}
    with pytest.raises(CalibrationError, match="its layers are not the student's"):
        load_state(tmp_path / "s", renamed, settings)


#: Another value of each setting that the numbers depend on, and what an error calls it.
OTHER = {
    "method": ("mse", "method"),
    "percentile": (99.0, "percentile"),
    "parts": ((STEPPED, TEXT), "parts"),
    "num_inference_steps": (3, "num-inference-steps"),
    "sizes": (((32, 32),), "sizes"),
    "guidance_scale": (1.0, "guidance-scale"),
    "seed": (1, "seed"),
    "batch": (2, "batch"),
    "max_sequence_length": (8, "max-sequence-length"),
    "dtype": ("bfloat16", "dtype"),
    "device": ("cuda", "device"),
    "shift": (3.0, "shift"),
    "timestep_ratio": (0.5, "timestep-ratio"),
    "straight": (Schedule(1.0, 1.0, 4), "schedule"),
    "negative_prompts": (("ugly",), "negative-prompt"),
    "true_cfg_scale": (4.0, "true-cfg-scale"),
}


def test_every_setting_is_tried():
    assert OTHER.keys() == {f.name for f in dataclasses.fields(CalibrationSettings)}


@pytest.mark.parametrize("field", OTHER)
def test_a_state_of_one_other_setting_is_refused_by_its_name(field, tmp_path):
    student, (value, name) = golden_student("flux-tiny"), OTHER[field]
    save_state(tmp_path / "s", SimpleNamespace(parts={}), settings_of(student, PROMPTS, CalibrationSettings()), 1)
    check_state(tmp_path / "s", settings_of(student, PROMPTS, CalibrationSettings()))
    other = settings_of(student, PROMPTS, dataclasses.replace(CalibrationSettings(), **{field: value}))
    with pytest.raises(CalibrationError, match=f"with other settings: {name} was "):
        check_state(tmp_path / "s", other)
    words = settings_of(student, Prompts("test", ("a", "b")), CalibrationSettings())
    with pytest.raises(CalibrationError, match="with other settings: prompts differ"):
        check_state(tmp_path / "s", words)
