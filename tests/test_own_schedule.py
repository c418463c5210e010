"""A student of one's own may have another shift and timestep ratio: export, torch, calibration and warnings agree."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from fake_bundle import FakeBackend, edit_manifest, make_bundle
from safetensors.numpy import load_file

from arcflow_export.export.export import plan_export
from arcflow_export.options import ExportOptions
from arcflow_export.student.reference import TorchStudent, schedule
from arcflow_export.student.schedule import shift_warning
from arcflow_export.verify.verify import VerifyCase, verify_bundle
from arcflow_runtime import Bundle, Pipeline, cli
from arcflow_runtime.backends import BACKENDS, DEFAULT_BACKEND
from arcflow_runtime.disk.manifest import Schedule
from arcflow_runtime.maths.schedule import sigmas
from tests.conftest import GOLDEN, golden_student

OWN = {"shift": 2.0, "timestep_ratio": 0.5}
#: Two steps at shift 2 and ratio 0.5: t = 1, 1 - 1/1.5 = 1/3, and sigma = 2t / (1 + t) = 1, 1/2.
OWN_SIGMAS = [1.0, 0.5, 0.0]


def test_torch_and_runtime_have_the_same_sigmas():
    np.testing.assert_allclose(schedule(2, **OWN), OWN_SIGMAS, rtol=2**-24)
    for steps in (1, 2, 3, 7):
        # float32 rounds to half an ulp, a relative error of 2**-24; the smallest normal sigma here is far above.
        ours = sigmas(steps, Schedule(2.0, 0.5, 2))
        np.testing.assert_allclose(schedule(steps, **OWN), ours, rtol=2**-24)
    # The released students': 3.2 * 0.5 / (1 + 2.2 * 0.5) = 16/21.
    np.testing.assert_allclose(schedule(2), [1.0, 16 / 21, 0.0], rtol=2**-24)


def test_a_bundle_has_the_schedule_and_agrees_with_torch(bundles):
    bundle = Bundle.open(bundles("flux-tiny", **OWN))
    assert bundle.manifest.schedule == Schedule(2.0, 0.5, 2)
    rows = verify_bundle(bundle, golden_student("flux-tiny"), [VerifyCase("a red circle", 32, 48, 2)])
    assert rows and all(row.passed for row in rows), [row for row in rows if not row.passed]
    # The released schedule would be seen: the second step starts elsewhere.
    run = TorchStudent(golden_student("flux-tiny")).generate("a red circle", 32, 48, max_sequence_length=512)
    own = TorchStudent(golden_student("flux-tiny"), **OWN).generate("a red circle", 32, 48, max_sequence_length=512)
    assert (run.steps[0] - own.steps[0]).abs().max() > 0.01


def test_a_table_is_baked_for_the_schedule(bundles):
    released, own = Bundle.open(bundles("qwen-tiny")), Bundle.open(bundles("qwen-tiny", **OWN))
    assert own.manifest.schedule == Schedule(2.0, 0.5, 2)
    tables = [load_file(b.path(b.manifest.modulation.file))["num_inference_steps_2"] for b in (released, own)]
    np.testing.assert_array_equal(tables[0][0], tables[1][0])  # both start at sigma 1
    assert np.abs(tables[0][1] - tables[1][1]).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shift", "0"], "--shift must be above 0 and finite, got 0"),
        (["--shift", "nan"], "--shift must be above 0 and finite, got nan"),
        (["--timestep-ratio", "1.5"], "--timestep-ratio must be above 0 and at most 1, got 1.5"),
    ],
)
@pytest.mark.parametrize("command", ["export", "calibrate"])
def test_a_wrong_schedule_is_refused(tmp_path, capsys, command, arguments, message):
    if command == "calibrate":
        pytest.importorskip("modelopt", reason="needs the extra 'calibrate'")
    sources = ["--base", "nowhere", "--adapter", "nowhere", "--out", str(tmp_path / "out")]
    assert cli.main([command, *sources, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_takes_it(tmp_path, capsys):
    sources = ["--base", str(GOLDEN / "flux-tiny" / "base"), "--adapter", str(GOLDEN / "flux-tiny" / "adapter")]
    where = ["--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert cli.main(["export", *sources, *where, "--shift", "2", "--timestep-ratio", "0.5"]) == 0
    assert "warning" not in capsys.readouterr().err  # its scheduler's shift depends on the size
    plan = plan_export(golden_student("flux-tiny"), ExportOptions(**OWN))
    assert (plan.options.shift, plan.options.timestep_ratio) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("config", "shift", "theirs"),
    [
        ({"shift": 3.0, "use_dynamic_shifting": True}, 3.2, None),
        ({"shift": 3.2}, 3.2, None),
        ({"shift": 3.0, "use_dynamic_shifting": False}, 3.2, "3"),
        ({}, 3.2, "1"),
        ({"shift": 3.2}, 2.0, "3.2"),
    ],
)
def test_a_base_of_another_shift_is_warned_of(tmp_path, config, shift, theirs):
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    expected = (
        f"the base's scheduler has shift {theirs} ({path}), the student is run with shift {shift:g}; "
        f"give --shift {theirs} if it was trained with that"
    )
    assert shift_warning(tmp_path, shift) == (None if theirs is None else expected)


def test_a_base_without_a_scheduler(tmp_path):
    assert shift_warning(tmp_path, 3.2) is None


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("schedule") / "bundle")


@pytest.mark.parametrize(("steps", "own", "warned"), [(2, 2, False), (4, 2, False), (5, 2, True), (7, 4, False)])
def test_many_more_steps_than_the_students_are_warned_of(tmp_path, steps, own, warned):
    root = make_bundle(tmp_path / "bundle")
    edit_manifest(root, schedule__num_inference_steps=own)
    output = Pipeline(Bundle.open(root), FakeBackend())("x", height=16, width=16, num_inference_steps=steps)
    expected = (
        f"num_inference_steps {steps} is more than 2 times the {own} that this student was made for; "
        f"more steps may not improve the image, use {own}"
    )
    assert output.warnings == ((expected,) if warned else ())


def test_the_command_warns_of_many_steps(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, DEFAULT_BACKEND, "fake_bundle")
    out = tmp_path / "x.png"
    arguments = ["generate", str(fake), "x", "--out", str(out), "--height", "16", "--width", "16", "--steps", "7"]
    assert cli.main([*arguments, "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("num_inference_steps 7 is more than 2 times the 2")


def test_calibration_runs_the_students_schedule(tmp_path):
    pytest.importorskip("modelopt", reason="needs the extra 'calibrate'")
    from arcflow_calibration.calibrate import calibrate
    from arcflow_calibration.options import CalibrationSettings
    from arcflow_export.formats.prompts import Prompts
    from arcflow_export.formats.scales import Scales

    settings = CalibrationSettings(sizes=((32, 32),), max_sequence_length=16)
    made = {}
    for name, changes in (("released", {}), ("own", OWN)):
        out = tmp_path / f"{name}.json"
        calibrate(golden_student("flux-tiny"), Prompts("test", ("x",)), dataclasses.replace(settings, **changes), out)
        made[name] = Scales.load(out)
    assert (made["released"].shift, made["released"].timestep_ratio) == (3.2, 1.0)
    assert (made["own"].shift, made["own"].timestep_ratio) == (2.0, 0.5)
    layer = "x_embedder"
    released, own = (made[name].parts["backbone"][layer].amax for name in ("released", "own"))
    assert released[0] == own[0]  # the noise
    assert not math.isclose(released[1], own[1], rel_tol=1e-3)


def test_the_reference_starts_at_one():
    assert torch.equal(schedule(1), torch.tensor([1.0, 0.0]))
