"""Whole runs on the golden checkpoints: the adapter, resuming, interruption, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import arcflow_distill.train.adapter
from arcflow_distill.errors import DistillError
from arcflow_distill.train.checkpoint import read_facts
from arcflow_distill.train.config import Config
from arcflow_distill.train.ema import Ema, decay
from arcflow_distill.train.folders import check_out, training_folder
from arcflow_distill.train.networks import Canvas
from arcflow_distill.train.policy import Policy, warp
from arcflow_distill.train.prompts import Encoder, collate, read_prompts
from arcflow_distill.train.trainer import Distillation, distill, learning_rate, teacher_ratio
from arcflow_export.checkpoint.sources import Location
from arcflow_export.student.load import load_student
from arcflow_export.student.reference import TorchStudent
from arcflow_export.verify.verify import VerifyCase, verify_bundle
from arcflow_runtime import cli
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import whole_directory
from tests.checkpoints import GOLDEN_SIZES, adapter_config
from tests.conftest import GOLDEN, export

SIZES = GOLDEN_SIZES | {"linear": dataclasses.replace(GOLDEN_SIZES["flux"], modes=1)}
PROMPT = "a cat"


@pytest.fixture(scope="module", params=SIZES)
def made(request, tmp_path_factory):
    """A base, and the adapter of a few iterations."""
    root, sizes = tmp_path_factory.mktemp(request.param), SIZES[request.param]
    base = GOLDEN / f"{sizes.family}-tiny" / "base"
    settings = {"true_cfg_scale": 2.0} if request.param == "qwen" else {}
    return base, distill(config(root, modes=sizes.modes, **settings), base, root / "adapter", progress=False), sizes


@pytest.fixture
def flux():
    return GOLDEN / "flux-tiny" / "base"


def config(root, **settings):
    prompts = root / "prompts.txt"
    prompts.write_text("a cat\n\na large red dog\na cat\n")
    small = {
        "prompts": str(prompts),
        "max_sequence_length": 16,
        "resolutions": [(32, 48), (32, 32)],
        "modes": 3,
        "rank": 4,
        "dtype": "float32",
        "adapter_dtype": "float32",
        "gradient_checkpointing": False,
        "iterations": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup": 2,
        "decay_iterations": 3,
        "ema_start": 1,
    }
    return Config(**small | settings)


def weights(adapter):
    return (adapter / "diffusion_pytorch_model.safetensors").read_bytes()


def open_student(base, adapter):
    return load_student(Location(str(base)), Location(str(adapter)), [])


def test_the_adapter_has_the_released_format(made):
    base, adapter, sizes = made
    student = open_student(base, adapter)
    assert student.adapter.num_gaussians == sizes.modes
    assert json.loads((adapter / "config.json").read_text()) == adapter_config(sizes) | {
        "axes_dims_rope": list(sizes.axes)
    }
    with safe_open(adapter / "diffusion_pytorch_model.safetensors", framework="pt") as f:
        assert json.loads(f.metadata()["policy_config"]) == {"type": "ArcFlow"}
    assert sorted(p.name for p in adapter.parent.iterdir()) == ["adapter", "prompts.txt"], "nothing is left"


def test_training_moved_everything(made):
    _, adapter, sizes = made
    tensors = load_file(adapter / "diffusion_pytorch_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    began_at_zero = {name for name in tensors if name.endswith("lora_B.weight")}
    if sizes.modes > 1:  # one mode has no gamma, and its weight is 1 whatever the logit
        began_at_zero |= {"proj_out_logweights.weight", "proj_out_loggamma.weight"}
    assert all(tensors[name].abs().max() > 0 for name in began_at_zero)


def test_the_record(made):
    _, adapter, _ = made
    record = json.loads((adapter / "training.json").read_text())
    assert record["config"]["iterations"] == 4
    assert record["trained_parameters"]["lora"] > 0
    assert {"torch", "python"} <= set(record["versions"])


def test_the_student_that_was_trained_is_the_one_that_draws(made, tmp_path):
    """The adapter through the exporter's torch student draws what the trained network draws."""
    base, adapter, sizes = made
    other = TorchStudent(open_student(base, adapter))
    drawing = other.generate(PROMPT, 32, 48, seed=3, max_sequence_length=16)
    run = Distillation(config(tmp_path, modes=sizes.modes), base, _accelerator())
    for name, tensor in load_file(adapter / "diffusion_pytorch_model.safetensors").items():
        run.trained[name].data.copy_(tensor)
    run.student.eval()
    encoder = Encoder(base, run.family, torch.float32, torch.device("cpu"), 16)
    text = collate(encoder.encode([PROMPT]))
    x, sigmas = drawing.noise, warp(torch.tensor([1.0, 0.5, 0.0]))
    for i, expected in enumerate(drawing.steps):
        start, end = sigmas[i : i + 1], sigmas[i + 1 : i + 2]
        with torch.no_grad():
            x = Policy.from_heads(*run.student(x, start, text, Canvas(2, 3, 3.5)), float(start)).move(x, start, end)
        assert torch.allclose(x, expected, atol=1e-4)


@pytest.mark.slow
def test_it_exports(made, tmp_path):
    base, adapter, _ = made
    student = open_student(base, adapter)
    bundle = Bundle.open(export(student, tmp_path / "bundle", opset=20))
    rows = verify_bundle(bundle, student, [VerifyCase(PROMPT, 32, 48, 2)])
    assert all(row.passed for row in rows)


def _accelerator():
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no")


@pytest.fixture
def ctrl_c_heeded():
    """A shell's background job ignores SIGINT; these tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(monkeypatch, iterations, number=signal.SIGINT):
    real = Distillation.iterate

    def iterate(self, iteration):
        figures = real(self, iteration)
        if iteration == iterations - 1:
            signal.raise_signal(number)
        return figures

    monkeypatch.setattr(Distillation, "iterate", iterate)


@pytest.mark.usefixtures("ctrl_c_heeded")
def test_a_resumed_run_is_the_same_to_the_bit(flux, tmp_path, monkeypatch):
    """The run stops after three iterations, when the average holds more than the last weights."""
    settings = config(tmp_path, ema_start=0, intermediate_states=1, batch_size=1, resolutions=[(32, 32)])
    straight = distill(settings, flux, tmp_path / "straight", progress=False)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            distill(settings, flux, out, progress=False)
    state = tmp_path / "out.training" / "state.safetensors"
    assert not out.exists()
    assert read_facts(state)["iteration"] == 3
    stored = load_file(state)
    assert not torch.equal(stored["average.norm_out.linear.weight"], stored["parameter.norm_out.linear.weight"])
    with pytest.raises(DistillError, match="--resume continues it"):
        distill(settings, flux, out, progress=False)
    with pytest.raises(DistillError, match=r"seed was 0 when the run began and is 1 now; give the same value$"):
        distill(settings.model_copy(update={"seed": 1}), flux, out, resume=True, progress=False)
    distill(settings, flux, out, resume=True, progress=False)
    assert weights(out) == weights(straight)
    assert not state.parent.exists()
    records = [json.loads((p / "training.json").read_text()) for p in (out, straight)]
    assert records[0]["pending"] == records[1]["pending"]


def test_an_ignored_signal_stays_ignored(flux, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt_after(monkeypatch, 1)
        assert (distill(config(tmp_path), flux, tmp_path / "out", progress=False) / "config.json").is_file()
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_saves_too(flux, tmp_path, monkeypatch, capsys):
    settings = config(tmp_path).model_dump(mode="json")
    (tmp_path / "mine.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in settings.items()))
    arguments = [str(tmp_path / "mine.toml"), "--base", str(flux), "--out", str(tmp_path / "out")]
    interrupt_after(monkeypatch, 1, signal.SIGTERM)
    assert cli.main(["distill", *arguments]) == cli.TERMINATED
    assert "stopped after 1 iterations; --resume continues" in capsys.readouterr().err
    assert (tmp_path / "out.training" / "state.safetensors").is_file()


def test_a_gradient_that_is_not_finite_is_left_out_and_not_for_ever(flux, tmp_path):
    run = Distillation(config(tmp_path), flux, _accelerator())
    run.trained["proj_out_means.bias"].data.fill_(math.nan)
    before = run.trained["norm_out.linear.weight"].clone()
    for i in range(19):
        assert math.isnan(run.iterate(i).gradient_norm)
    with pytest.raises(DistillError, match="not finite in the last 20"):
        run.iterate(19)
    assert torch.equal(run.trained["norm_out.linear.weight"], before)


@pytest.mark.slow
def test_another_seed_gives_another_student(flux, tmp_path):
    one, two = (distill(config(tmp_path, seed=s), flux, tmp_path / f"{s}", progress=False) for s in (0, 1))
    assert weights(one) != weights(two)


def test_bfloat16_base_with_gradient_checkpointing(flux, tmp_path):
    settings = config(tmp_path, dtype="bfloat16", adapter_dtype="bfloat16", gradient_checkpointing=True, iterations=2)
    out = distill(settings, flux, tmp_path / "out", progress=False)
    tensors = load_file(out / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    open_student(flux, out)


def test_prompts_that_are_not_cached(flux, tmp_path):
    cached, lazy = (
        distill(config(tmp_path, cached_prompts=n, iterations=2), flux, tmp_path / f"{n}", progress=False)
        for n in (9, 0)
    )
    a, b = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (cached, lazy))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def test_an_interrupted_write_leaves_nothing(flux, tmp_path, monkeypatch):
    def save(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(arcflow_distill.train.adapter, "save_file", save)
    with pytest.raises(OSError, match="disk full"):
        distill(config(tmp_path, iterations=1), flux, tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.training", "prompts.txt"]
    monkeypatch.undo()
    distill(config(tmp_path, iterations=1), flux, tmp_path / "out", resume=True, progress=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_out_is_refused(tmp_path):
    with pytest.raises(DistillError, match="not a directory"):
        check_out(tmp_path / "missing" / "out", False)
    (tmp_path / "other").mkdir()
    with pytest.raises(DistillError, match="is not an adapter"):
        check_out(tmp_path / "other", True)
    with whole_directory(tmp_path / "out") as folder:
        (folder / "config.json").touch()
        (folder / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(DistillError, match="--overwrite"):
        check_out(tmp_path / "out", False)
    check_out(tmp_path / "out", True)


def test_two_runs_exclude_each_other(tmp_path):
    folder = tmp_path / "out.training"
    with training_folder(folder, False, False, False):
        with pytest.raises(DistillError, match="another run"), training_folder(folder, False, False, False):
            pass
        assert folder.is_dir()
    assert not folder.exists()


def test_prompts_are_checked(tmp_path):
    with pytest.raises(DistillError, match="--prompts FILE"):
        read_prompts(Config())
    with pytest.raises(DistillError, match="is not a file"):
        read_prompts(Config(prompts=str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(DistillError, match="is empty"):
        read_prompts(Config(prompts=str(tmp_path / "empty.txt")))
    assert read_prompts(config(tmp_path)) == ["a cat", "a large red dog", "a cat"]


def test_captions_of_the_shapes():
    prompts = read_prompts(Config(prompts="shapes", prompt_count=50))
    assert len(prompts) == 50 and len(set(prompts)) > 25
    # A background is named in both ways.
    assert any(" on a " in p for p in prompts) and any(", " in p for p in prompts)
    assert prompts == read_prompts(Config(prompts="shapes", prompt_count=50))


def test_schedules():
    c = Config(iterations=1000, schedule="cosine", learning_rate=1.0, warmup=100, decay_iterations=500)
    assert learning_rate(c, 0) == pytest.approx(1e-3)
    assert learning_rate(c, 50) == pytest.approx(0.5005)
    assert learning_rate(c, 100) == 1.0
    assert learning_rate(c, 550) == pytest.approx(0.5)
    assert learning_rate(c, 999) < 1e-5
    assert learning_rate(Config(), 9000) == 1e-4
    assert [teacher_ratio(c, i) for i in (0, 250, 500, 900)] == [1.0, 0.5, 0.0, 0.0]
    assert teacher_ratio(Config(decay_iterations=0), 0) == 0.0


def test_the_average_is_the_power_law():
    """After n updates, update i weighs about (gamma + 1) i^gamma / n^(gamma + 1)."""
    assert decay(50, 100, 7) == decay(100, 100, 7) == 0.0
    assert decay(101, 100, 7) == 0.5**8
    value = torch.zeros(1)
    ema = Ema({"w": value}, 7.0, 0)
    for i in range(1000):
        ema.update({"w": torch.tensor([float(i)])}, i)
    assert float(ema.tensors["w"]) == pytest.approx(1000 * 8 / 9, rel=0.01)
    assert math.isfinite(float(value))


def test_the_command(flux, tmp_path, capsys):
    config(tmp_path)
    (tmp_path / "mine.toml").write_text(
        'prompts = "prompts.txt"\nresolutions = [[32, 32]]\nmax_sequence_length = 8\ndtype = "float32"\n'
        "gradient_checkpointing = false\n"
    )
    arguments = [str(tmp_path / "mine.toml"), "--base", str(flux), "--out", str(tmp_path / "out"), "--rank", "2"]
    arguments += ["--iterations", "1", "--batch-size", "1", "--modes", "2", "--set", "substeps=64"]
    assert cli.main(["distill", *arguments]) == cli.DONE
    printed = capsys.readouterr()
    assert "arcflow export --base" in printed.out
    assert "of the base: heads" in printed.err
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["config"]["substeps"] == 64
    assert record["base"] == "base"
    assert cli.main(["distill", *arguments]) == cli.FAILED
    assert "--overwrite" in capsys.readouterr().err
