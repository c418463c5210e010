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
        ({"dtype": "float16"}, RunsOn(True, True)),
        ({"precision": (("text_encoder_2", "bfloat16"),)}, RunsOn(False, False)),
    ],
)
def test_by_dtype_and_opset(bundles, options, expected):
    assert runs_on(Bundle.open(bundles("flux-tiny", **options))) == expected


def test_sentences():
    assert [RunsOn(*case).sentence() for case in ((True, False), (False, True), (True, True))] == [
        "runs on: ONNX Runtime on a CPU; TensorRT has no attention in float32 as one operator, for that export with "
        "--opset 20",
        "runs on: TensorRT, from engines that arcflow build makes; ONNX Runtime has no bfloat16 on a CPU, for that "
        "export with --dtype float32",
        "runs on: ONNX Runtime on a CPU, and TensorRT, from engines that arcflow build makes",
    ]
    assert RunsOn(False, False).sentence().startswith("runs on: neither ONNX Runtime on a CPU, which has no bfloat16, ")
