"""`arcflow calibrate` against ranges recorded by the tests' own hooks on the torch student, and its command.

The hooks and numpy know nothing of modelopt; the student draws the same prompts through its own `draw`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from arcflow_export.student.reference import TorchStudent
from arcflow_runtime import cli
from arcflow_runtime.disk.bundle import Bundle
from tests.announced import after_announcement
from tests.conftest import GOLDEN, golden_student

pytest.importorskip("modelopt", reason="needs the extra 'calibrate'")

from arcflow_calibration import calibrate as module
from arcflow_calibration.calibrate import calibrate
from arcflow_calibration.options import CalibrationSettings
from arcflow_calibration.ranges import BINS, make_calibrator
from arcflow_calibration.state import settings_of
from arcflow_export.checkpoint.sources import Location
from arcflow_export.errors import CalibrationError
from arcflow_export.formats.prompts import Prompts
from arcflow_export.formats.scales import Scales

TEXTS = ("a red circle", "portrait of an old sailor, oil painting, detailed", "two cats")
PROMPTS = Prompts("test", TEXTS)
#: Two sizes, taken in turn.
SIZES = ((64, 48), (32, 64))
SETTINGS = {
    "flux-tiny": CalibrationSettings(parts=("backbone", "text_encoder_2"), sizes=SIZES, max_sequence_length=24, seed=5),
    "qwen-tiny": CalibrationSettings(parts=("backbone", "text_encoder"), sizes=SIZES, max_sequence_length=24, seed=5),
}


class Recorded:
    """|input| and |output| of every linear that the torch student calls, by layer and step, as float32 arrays."""

    def __init__(self, name: str, dtype: torch.dtype):
        student = TorchStudent(golden_student(name), dtype)
        pipe = student.pipe
        encoder = pipe.text_encoder_2 if name == "flux-tiny" else pipe.text_encoder.model.language_model
        self.inputs: dict[tuple[str, int], list[np.ndarray]] = {}
        self.outputs: dict[tuple[str, int], float] = {}
        self.step = 0
        for root, prefix in ((student.transformer, ""), (student.heads, ""), (encoder, "text:")):
            for layer, linear in root.named_modules():
                if isinstance(linear, nn.Linear) and "lora_" not in layer:
                    key = prefix + layer.removesuffix(".base_layer")
                    linear.register_forward_pre_hook(self._input(key))
                    outer = root.get_submodule(layer.removesuffix(".base_layer"))  # with the LoRA factors
                    outer.register_forward_hook(self._output(key))
        for i, text in enumerate(TEXTS):
            height, width = SIZES[i % len(SIZES)]
            self.step = 0
            student.generate(text, height, width, 2, 5 + i, max_sequence_length=24, on_step=self._advance)

    def _advance(self, step: int) -> None:
        self.step = step + 1

    def _input(self, key):
        def hook(_, args):
            self.inputs.setdefault((key, self.step), []).append(args[0].float().abs().flatten().numpy().copy())

        return hook

    def _output(self, key):
        def hook(_, args, output):
            peak = float(output.float().abs().max())
            self.outputs[key, self.step] = max(self.outputs.get((key, self.step), 0.0), peak)

        return hook

    def values(self, key: str, step: int) -> np.ndarray:
        return np.concatenate(self.inputs[key, step])


@pytest.fixture(scope="module")
def recorded():
    made = {}

    def get(name, dtype="float32"):
        if (name, dtype) not in made:
            made[name, dtype] = Recorded(name, getattr(torch, dtype))
        return made[name, dtype]

    return get


def run(name, out, **changes) -> Scales:
    return calibrate(golden_student(name), PROMPTS, dataclasses.replace(SETTINGS[name], **changes), out)


def keys(scales):
    """(part, layer, the recording's name of the layer, steps)."""
    for part, layers in scales.parts.items():
        for layer, r in layers.items():
            # The Qwen checkpoint's prefix is that of another version of transformers than the module's.
            name = layer if part == "backbone" else f"text:{layer.removeprefix('model.')}"
            yield part, layer, name, len(r.amax)


@pytest.mark.parametrize(
    ("name", "dtype"), [("flux-tiny", "float32"), ("flux-tiny", "bfloat16"), ("qwen-tiny", "float32")]
)
def test_max_is_what_hooks_see(name, dtype, tmp_path, recorded):
    scales, truth = run(name, tmp_path / "scales.json", dtype=dtype), recorded(name, dtype)
    assert Scales.load(tmp_path / "scales.json") == scales
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scales.json"]
    assert (scales.method, scales.dtype, scales.sizes) == ("max", dtype, SIZES)
    for part, layer, key, steps in keys(scales):
        r = scales.parts[part][layer]
        assert steps == (2 if part == "backbone" else 1)
        assert r.amax == tuple(float(truth.values(key, step).max()) for step in range(steps)), layer
        assert r.output_amax == tuple(truth.outputs[key, step] for step in range(steps)), layer
    differing = [layer for layer, r in scales.parts["backbone"].items() if r.amax[0] != r.amax[1]]
    assert len(differing) > 0.8 * len(scales.parts["backbone"]), "the steps were not told apart"
    x = scales.parts["backbone"]["x_embedder" if name == "flux-tiny" else "img_in"]
    assert x.samples == 4 * 3 + 2 * 4 + 4 * 3, "image tokens of 64x48, 32x64, 64x48"


@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_layers_are_the_graphs_matmuls(name, tmp_path, bundles):
    bundle = Bundle.open(bundles(name, opset=23, steps=(2, 4)))
    scales = run(name, tmp_path / "scales.json")
    scales.check_belongs(bundle.manifest)
    for part, layers in scales.parts.items():
        graph = ir.load(bundle.path(bundle.manifest.parts[part].graph)).graph
        weights = {n.inputs[1].name for n in graph if n.op_type == "MatMul" and n.inputs[1].name in graph.initializers}
        assert {f"{layer}.weight" for layer in layers} == weights, part
    singles = [layer for layer in scales.parts["backbone"] if layer.endswith(".proj_out")]
    assert bool(singles) == (name == "flux-tiny"), "modelopt's default would skip these"


@pytest.mark.parametrize("name", ["flux-tiny", "qwen-tiny"])
def test_percentile_is_numpys(name, tmp_path, recorded):
    p = 99.0
    scales, truth = run(name, tmp_path / "scales.json", method="percentile", percentile=p), recorded(name)
    lower = 0
    for part, layer, key, steps in keys(scales):
        for step in range(steps):
            values, got = truth.values(key, step), scales.parts[part][layer].amax[step]
            wanted = np.percentile(values.astype(np.float64), p, method="inverted_cdf")
            # The histogram spans at most twice the largest value; the upper edge of the value's bin is given. float32
            # places a value within 2^-23 of the span, so an edge may be missed by that.
            width = 2 * values.max() / BINS
            assert -width * 1e-3 <= got - wanted <= width * 1.001, (layer, step)
            assert got <= values.max()
            lower += got < 0.9 * values.max()
    assert lower, "nothing was clipped"


def e4m3(values: np.ndarray, amax: float) -> np.ndarray:
    scaled = np.clip(values * (448 / amax), -448, 448).astype(np.float32)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * (amax / 448)


def rms(values: np.ndarray, amax: float) -> float:
    return float(np.sqrt(np.mean((values - e4m3(values, amax)) ** 2)))


@pytest.mark.slow
def test_mse_is_the_least_error(tmp_path, recorded):
    scales, truth = run("flux-tiny", tmp_path / "scales.json", method="mse"), recorded("flux-tiny")
    layers = ("transformer_blocks.1.ff.net.2", "single_transformer_blocks.0.proj_out", "context_embedder")
    for layer in layers:
        for step in range(2):
            values = truth.values(layer, step).astype(np.float64)
            peak = values.max()
            candidates = peak * np.linspace(1 / 16, 1, 481)
            best = min(rms(values, a) for a in candidates)
            # Each value stands at its bin's centre, at most half a width away; the distance to the nearest number of a
            # grid, or to its end, changes by no more than that, so each RMS is off by at most half a width.
            width = 2 * peak / BINS
            got = scales.parts["backbone"][layer].amax[step]
            assert rms(values, got) <= best + width, layer
            assert peak / 16 <= got <= peak * (1 + 1e-6)


@pytest.mark.slow
def test_batches_are_cut_by_size_and_text_length(tmp_path):
    """Only rounding may depend on the batch: with the wrong noise or prompt, ranges would change by percents."""
    for name in SETTINGS:
        one, two = (run(name, tmp_path / f"{name}-{b}.json", batch=b) for b in (1, 3))
        for layer, r in one.parts["backbone"].items():
            assert two.parts["backbone"][layer].amax == pytest.approx(r.amax, rel=1e-4), layer
            assert two.parts["backbone"][layer].samples == r.samples


class Stop(BaseException):
    pass


def stop_after(monkeypatch, count):
    """Stop in the middle of the batch after `count` whole ones, when part of it is collected."""
    calls, original = [], module.generate_batch

    def draw(*args):
        calls.append(args)
        original(*args)
        if len(calls) > count:
            raise Stop

    monkeypatch.setattr(module, "generate_batch", draw)
    return calls


@pytest.mark.parametrize("method", ["max", *(pytest.param(m, marks=pytest.mark.slow) for m in ("percentile", "mse"))])
def test_a_stopped_run_goes_on_bit_for_bit(method, tmp_path, monkeypatch):
    """The run stops in the second of three prompts and again in the third; mse keeps the same state as percentile."""
    changes = {"method": method, "percentile": 99.9 if method == "percentile" else None}
    run("flux-tiny", tmp_path / "whole.json", **changes)
    out = tmp_path / "scales.json"
    for done in (1, 2):
        stop_after(monkeypatch, 1)
        with pytest.raises(Stop):
            run("flux-tiny", out, **changes)
        monkeypatch.undo()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["scales.json.state.safetensors", "whole.json"]
        with safe_open(tmp_path / "scales.json.state.safetensors", "pt") as f:
            assert json.loads(f.metadata()["calibration"])["done"] == done, "one more each time"
    calls = stop_after(monkeypatch, 99)
    run("flux-tiny", out, **changes)
    assert [[i for i, _ in batch.prompts] for _, batch, *_ in calls] == [[1]], "sizes take turns: 0, 2 and then 1"
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scales.json", "whole.json"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a copy of the golden student and the state of a stopped run."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(GOLDEN / "flux-tiny", folder / "student")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            command(folder)
    return folder


def command(folder, *more):
    student = folder / "student"
    arguments = ["--base", student / "base", "--adapter", student / "adapter", "--prompts", folder / "prompts.txt"]
    (folder / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    arguments += ["--sizes", "32x32", "--max-sequence-length", "8", "--device", "cpu", "--out", folder / "scales.json"]
    return cli.main(["calibrate", *map(str, arguments), *more])


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--dtype", "bfloat16"), 'dtype was "float32", is "bfloat16"'),
        (("--seed", "1", "--batch", "2"), "seed was 0, is 1; batch was 1, is 2"),
        (("--limit", "2"), "prompts differ"),
        (("--method", "mse"), 'method was "max", is "mse"'),
    ],
)
def test_a_state_of_other_settings_is_refused(stopped, capsys, options, difference):
    assert command(stopped, *options) == 1
    assert after_announcement(capsys.readouterr().err) == (
        f"arcflow calibrate: error: {stopped / 'scales.json.state.safetensors'} holds a stopped run with other "
        f"settings: {difference}. Give the same settings to continue it, or --overwrite to start again\n"
    )


@pytest.mark.parametrize(("folder", "name"), [("base/transformer", "base"), ("adapter", "adapter")])
def test_a_state_of_other_weights_is_refused(stopped, capsys, folder, name):
    """Weights of the same names and shapes: the header, and so the digest of provenance, is unchanged."""
    path = stopped / "student" / folder / "diffusion_pytorch_model.safetensors"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    assert command(stopped) == 1
    assert f"with other settings: {name} differs. Give" in capsys.readouterr().err
    data[-4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_config_beside_a_lora_counts(tmp_path):
    """It can change the scale, and so every activation."""
    factors = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 64)}
    factors["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(64, 4)
    save_file(factors, tmp_path / "ink.safetensors")
    found = []
    for config in (None, {"lora_alpha": 4, "r": 4}, {"lora_alpha": 16, "r": 4}):
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        student = golden_student("flux-tiny", [(Location(str(tmp_path / "ink.safetensors")), 1.0)])
        found.append(str(settings_of(student, PROMPTS, SETTINGS["flux-tiny"])["LoRAs"]))
    assert len({*found}) == 3


def test_a_damaged_state_is_refused(stopped, capsys):
    state = stopped / "scales.json.state.safetensors"
    data = state.read_bytes()
    state.write_bytes(data[:100])
    assert command(stopped) == 1
    assert "is not a calibration state" in capsys.readouterr().err
    state.write_bytes(data)
    with safe_open(state, "pt") as f:
        metadata = f.metadata()
    save_file(load_file(state) | {"backbone.peak": torch.zeros(1)}, state, metadata)
    assert command(stopped) == 1
    assert "is damaged (backbone.peak is torch.float32 [1]); --overwrite starts again" in capsys.readouterr().err
    state.write_bytes(data)


def test_the_command(stopped, tmp_path, capsys, monkeypatch):
    """Continues the stopped run, prints its table, and then refuses to write over the result."""
    stopped = shutil.copytree(stopped, tmp_path / "copy")
    calls = stop_after(monkeypatch, 99)
    assert command(stopped) == 0
    assert len(calls) == 2
    out = capsys.readouterr().out.splitlines()
    assert " ".join(out[0].split()) == "part layers largest ratio of steps steps differ > 2x output > 65504"
    assert out[1].split()[:2] == ["backbone", str(len(Scales.load(stopped / "scales.json").parts["backbone"]))]
    assert out[-1].startswith(f"wrote {stopped / 'scales.json'}; quantise with: arcflow quantize BUNDLE --scales")
    assert command(stopped) == 1
    assert "scales.json exists; give another name, or --overwrite" in capsys.readouterr().err
    before = (stopped / "scales.json").read_bytes()
    assert command(stopped, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parts"][0]["part"] == "backbone"
    assert (stopped / "scales.json").read_bytes() == before


def test_bad_options(stopped, capsys):
    for options, code, message in (
        (("--percentil", "99"), 2, "unknown argument '--percentil'; did you mean --percentile?"),
        (("--percentile", "99"), 2, "--percentile needs --method percentile"),
        (("--method", "percentile", "--percentile", "101"), 2, "must be above 0 and at most 100, got 101.0"),
        (("--method", "median"), 2, "argument --method: invalid choice: 'median'"),
        (("--sizes", "100x64"), 2, "sides must be positive multiples of 16, got '100x64'"),
        (("--sizes", "64"), 2, "must be HEIGHTxWIDTH such as 1024x1024, got '64'"),
        (("--limit", "0"), 2, "--limit must be at least 1, got 0"),
        (("--batch", "0"), 2, "--batch must be at least 1, got 0"),
        (("--num-inference-steps", "0"), 2, "--num-inference-steps must be between 1 and 1000, got 0"),
        (("--parts", "backbone,vae"), 1, "--parts: must be among backbone, text_encoder_2 for a flux student, got vae"),
        (("--out", "/nowhere/scales.json"), 1, "--out: /nowhere is not a directory; create it first"),
    ):
        assert command(stopped, *options) == code, options
        assert message in capsys.readouterr().err


def test_ctrl_c_says_what_was_kept(stopped, tmp_path, capsys, monkeypatch):
    (tmp_path / "student").symlink_to(stopped / "student")

    def interrupted(*_):
        raise KeyboardInterrupt

    stop_after(monkeypatch, 1)
    with pytest.raises(Stop):
        command(tmp_path)
    monkeypatch.setattr(module, "generate_batch", interrupted)
    assert command(tmp_path) == 130
    state = tmp_path / "scales.json.state.safetensors"
    assert f"kept {state}; run the same command again to continue\n" in capsys.readouterr().err


def test_guidance_of_a_student_that_takes_none(tmp_path):
    with pytest.raises(CalibrationError, match="this student takes none; leave it out"):
        run("qwen-tiny", tmp_path / "scales.json", guidance_scale=4.0)


def test_a_histogram_that_grows(tmp_path):
    """However values arrive, every one is counted once and its bin is as wide as the whole range allows."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.zeros(7)] + [torch.randn(1000, generator=generator) * s for s in (1e-3, 1.0, 1e4, 0.1)]
    values = torch.cat(batches).abs().numpy().astype(np.float64)
    for p in (50.0, 80.0, 99.0, 100.0):
        calibrator = make_calibrator("x", "percentile", p)
        for batch in batches:
            calibrator.collect(batch)
        assert int(calibrator.counts.sum()) == len(values)
        assert values.max() <= calibrator.span < 2 * values.max()
        width = calibrator.span / BINS
        wanted = np.percentile(values, p, method="inverted_cdf")
        assert -1e-3 * width <= calibrator.amax() - wanted <= 1.001 * width


def test_what_modelopts_histogram_gets_wrong():
    # One value far above the rest: the percentile's bin is the first, whose lower edge is no range.
    calibrator = make_calibrator("x", "percentile", 99.0)
    calibrator.collect(torch.cat([torch.ones(1000), torch.tensor([1e6])]))
    assert 1 <= calibrator.amax() <= 1 + 1e6 / BINS
    # More than 2^24 values of one bin in a call, more than 2^31 in all.
    calibrator.collect(torch.zeros((1 << 24) + 5))
    assert int(calibrator.counts[0]) == 1000 + (1 << 24) + 5
    calibrator.counts[0] += 1 << 33
    calibrator.counts[2000] += 1 << 30
    assert calibrator.amax() == pytest.approx(1e6 * 2001 / BINS)


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_activation_is_named(method, value):
    calibrator = make_calibrator("transformer_blocks.0.attn.to_q", method, None)
    with pytest.raises(CalibrationError, match=r"transformer_blocks.0.attn.to_q: its input holds (NaN|Inf)"):
        calibrator.collect(torch.tensor([1.0, value]))
