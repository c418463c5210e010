"""NVFP4 bundles through the real TensorRT-RTX builder: engines with FP4 products for sm120; no GPU is needed."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from arcflow_runtime import Bundle, cli
from arcflow_runtime.build.build import BuildSettings
from arcflow_runtime.build.plan import plan_builds
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.errors import EngineError
from tests.checkpoints import Sizes, make_student
from tests.conftest import SHAPES_OPTIONS, export
from tests.fp8 import make_scales, quantize
from tests.plans import PADDING, read_plan

trt = pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[tensorrt-rtx]'", exc_type=ImportError
)

FP4, FP8, BF16 = (("fp4_e2m1",) * 2, ("fp8_e4m3",) * 2, ("bf16",) * 2)


def check_engine(root: Path, size_px: int) -> None:
    """Build the backbone for sm120 and check that every linear is multiplied in its format, and nothing is padded."""
    with redirect_stdout(io.StringIO()) as out:
        command = ["build", root, "--backend", "tensorrt-rtx", "--target", "sm120", "--parts", "backbone", "--json"]
        assert cli.main([*map(str, command), "--resolutions", str(size_px)]) == 0
    (row,) = json.loads(out.getvalue())["engines"]
    products, kernels = read_plan(Path(row["file"]))
    q = Bundle.open(root).manifest.parts["backbone"].quantization
    wanted = {"nvfp4": FP4, "fp8_e4m3": FP8}
    kinds = {part: kind for name, kind in products.items() for part in name.split("+")}
    assert {name: kinds[name] for name in q.layers} == {name: wanted[q.format_of(name)] for name in q.layers}
    assert FP4 in products.values() and FP8 in products.values()
    assert {kind for name, kind in kinds.items() if name not in q.layers} == {BF16}
    assert not [name for name in kernels if PADDING in name]


@pytest.mark.slow
def test_an_engine_of_shapes(bundles, tmp_path):
    root = bundles("shapes", dtype="bfloat16", **SHAPES_OPTIONS)
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    check_engine(quantize(root, tmp_path / "b", scales, "shapes-nvfp4").root, 64)


@pytest.mark.slow
def test_an_engine_of_flux_s_own_blocks(tmp_path):
    """One double and one single block at FLUX's width, for 4,096 image tokens and up to 512 text tokens."""
    torch.set_default_dtype(torch.bfloat16)  # half the memory: the weights are 1.1 GB
    try:
        student = make_student(tmp_path / "student", Sizes(heads=24, axes=(16, 56, 56), dtype=torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    root = export(student, tmp_path / "bf16", dtype="bfloat16", max_px=1024)
    scales = make_scales(Bundle.open(root), lambda *_: 4.0)
    check_engine(quantize(root, tmp_path / "b", scales, "flux-nvfp4").root, 1024)


def test_targets_before_blackwell_are_refused(bundles, tmp_path):
    root = bundles("flux-tiny", dtype="bfloat16")
    bundle = quantize(root, tmp_path / "b", make_scales(Bundle.open(root), lambda *_: 4.0), "flux-nvfp4")

    def plan(target: str) -> list:
        return plan_builds(bundle, "tensorrt-rtx", [target], ["backbone"], (), SizeRange(1, 1), BuildSettings())

    with pytest.raises(EngineError, match="backbone is in NVFP4, which sm89 does not support; build for sm100"):
        plan("sm89")
    assert [job.target for target in ("sm120", "sm121") for job in plan(target)] == ["sm120", "sm121"]
