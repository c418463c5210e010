"""Calibration of students that do not fit in memory: what it needs, and the same file of scales from disk."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.announced import after_announcement
from tests.conftest import GOLDEN, golden_student

pytest.importorskip("modelopt", reason="needs the extra 'calibrate'")

from arcflow_calibration import calibrate as module
from arcflow_calibration import memory
from arcflow_calibration.collect import Collector
from arcflow_calibration.options import CalibrationSettings
from tests.test_calibrate import Stop, command, run, stop_after


def force_disk(monkeypatch, forced=True):
    monkeypatch.setattr(memory, "stays_on_disk", lambda needed, free: forced)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux-tiny", {"batch": 2}),
        pytest.param("flux-tiny", {"dtype": "bfloat16", "method": "mse"}, marks=pytest.mark.slow),
        pytest.param("qwen-tiny", {"dtype": "bfloat16", "batch": 2}, marks=pytest.mark.slow),
        pytest.param("qwen-tiny", {"method": "percentile", "percentile": 99.9}, marks=pytest.mark.slow),
    ],
)
def test_weights_on_disk_give_the_same_file(name, changes, tmp_path, monkeypatch):
    """Three prompts, in memory, on disk, and on disk from where a run in memory stopped."""
    force_disk(monkeypatch, False)
    run(name, tmp_path / "memory.json", **changes)
    stop_after(monkeypatch, 0)
    with pytest.raises(Stop):
        run(name, tmp_path / "resumed.json", **changes)
    monkeypatch.undo()
    force_disk(monkeypatch)
    students = []
    monkeypatch.setattr(module, "Collector", lambda *args: students.append(args[1]) or Collector(*args))
    for out in ("disk.json", "resumed.json"):
        run(name, tmp_path / out, **changes)
        assert (tmp_path / out).read_bytes() == (tmp_path / "memory.json").read_bytes()
    for student in students:
        assert student.on_disk
        linear = student.transformer.transformer_blocks[0].attn.to_q
        assert linear.weight.is_meta and linear.input_quantizer is not None


@pytest.mark.slow
def test_a_student_that_does_not_fit(tmp_path, capsys, monkeypatch):
    """Read from disk, and the command says so; refused where one layer does not fit either."""
    (tmp_path / "student").symlink_to(GOLDEN / "flux-tiny")
    footprint = memory.measure(
        golden_student("flux-tiny"), CalibrationSettings(sizes=((32, 32),), max_sequence_length=8)
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: footprint.least)
    monkeypatch.setattr(memory, "_gib", lambda value: f"{value} B")
    assert command(tmp_path) == 0
    assert (
        f"the student's weights need {footprint.weights} B of memory in float32, {footprint.least} B are free: they "
        f"are read from disk as they are used, {footprint.read} B per network call and {footprint.read_text} B per "
        "batch of prompts\n"
    ) in capsys.readouterr().err
    monkeypatch.setattr(memory, "free_bytes", lambda device: footprint.least - 1)
    assert command(tmp_path, "--overwrite") == 1
    assert after_announcement(capsys.readouterr().err) == (
        f"arcflow calibrate: error: calibration needs at least {footprint.least} B of memory in float32, even with one "
        f"layer in memory at a time, {footprint.least - 1} B are free; give --dtype bfloat16 or smaller --sizes or "
        "--batch, or calibrate on a machine with more memory: scales.json is small and can be used on any machine\n"
    )


@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_footprint(name):
    """Bytes counted from the files themselves; the tiny checkpoints are in float32."""
    values = {
        path.parent.name: {key: tensor.numel() for key, tensor in load_file(path).items()}
        for path in [*(GOLDEN / name).glob("base/*/*.safetensors"), *(GOLDEN / name / "adapter").glob("*.safetensors")]
    }
    used = {
        folder: {key: n for key, n in found.items() if not key.startswith(("visual.", "lm_head."))}
        for folder, found in values.items()
    }
    total = sum(n for found in values.values() for n in found.values())
    encoders = [used[folder] for folder in ("text_encoder", "text_encoder_2") if folder in used]
    largest = max(n for found in (used["transformer"], *encoders) for n in found.values())
    beside = sum(values["adapter"].values()) + sum(values["vae"].values())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        settings = CalibrationSettings(dtype=dtype, sizes=((64, 32), (32, 32)), max_sequence_length=24, batch=3)
        footprint = memory.measure(golden_student(name), settings)
        assert footprint.weights == size * total
        assert footprint.read == 4 * sum(values["transformer"].values())
        assert footprint.read_text == 4 * sum(n for found in encoders for n in found.values())
        activations = 3 * (8 + 24) * 64 * 26 * size  # batch, tokens of image and text, width
        assert footprint.least == size * (beside + largest) + 4 * largest + activations
