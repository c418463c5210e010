"""What is said at the end of an export is what the engines take."""

from __future__ import annotations

import pytest

from arcflow_export.export.runs_on import RunsOn, runs_on
from arcflow_runtime.disk.bundle import Bundle


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, RunsOn(True, False)),
        pytest.param({"opset": 20}, RunsOn(True, True), marks=pytest.mark.slow),
        ({"dtype": "bfloat16"}, RunsOn(False, True)),
        pytest.param({"dtype": "float16"}, RunsOn(True, True), marks=pytest.mark.slow),
        pytest.param({"precision": (("text_encoder_2", "bfloat16"),)}, RunsOn(False, False), marks=pytest.mark.slow),
    ],
)
def test_by_dtype_and_opset(bundles, options, expected):
    assert runs_on(Bundle.open(bundles("flux-tiny", **options))) == expected


def test_sentences():
    assert [RunsOn(*case).sentence() for case in ((True, False), (False, True), (True, True))] == [
        "runs on: ONNX Runtime and OpenVINO on a CPU. TensorRT has no float32 Attention operator: "
        "export with --opset 20 for it",
        "runs on: OpenVINO on a CPU, and TensorRT after `arcflow build`. ONNX Runtime has no bfloat16 on a CPU: "
        "export with --dtype float32 for it",
        "runs on: ONNX Runtime and OpenVINO on a CPU, and TensorRT after `arcflow build`",
    ]
    assert (
        RunsOn(False, False)
        .sentence()
        .startswith("runs on: OpenVINO on a CPU. ONNX Runtime has no bfloat16 on a CPU: ")
    )
