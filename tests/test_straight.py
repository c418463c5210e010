"""Bundles of bases without an adapter, against diffusers' own pipelines and scheduler."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from arcflow_export.checkpoint.sources import Resolved
from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.drift.stages import BundleStages, backbone_inputs
from arcflow_export.errors import SourceError
from arcflow_export.formats.scales import Scales
from arcflow_export.student.schedule import base_schedule
from arcflow_runtime import Bundle, Pipeline, cli
from arcflow_runtime.generate import straight as runtime_straight
from arcflow_runtime.maths.schedule import sigmas
from tests.checkpoints import GOLDEN, Sizes, make_base, make_style

SCHEDULER = Path("scheduler") / "scheduler_config.json"
#: The project's contract for float32: latents within 1e-4 of the largest value, images within 1.5 grey levels.
LATENTS, IMAGE = 1e-4, 1.5 / 255
#: Text tokens of a bundle. The tiny tokenizer makes more than 100 of Qwen-Image's template, of which 34 are dropped, so
#: with fewer tokens all prompts would be cut to the same text.
TOKENS = {"qwen": 160, "flux": 32, "schnell": 32}


def with_scheduler(base: Path, **changes) -> Path:
    path = base / SCHEDULER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return base


def exported(folder: Path, kind: str, options: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """Write a tiny base and export it; returns both."""
    base = folder / "base"
    if kind == "schnell":
        make_base(base, Sizes(guidance=False))
        with_scheduler(base, use_dynamic_shifting=False, shift=1.0)
    else:
        shutil.copytree(GOLDEN / f"{kind}-tiny" / "base", base)
    arguments = ["export", "--base", base, "--out", folder / "bundle", "--max-px", "256"]
    arguments += ["--max-sequence-length", TOKENS[kind], *options]
    assert cli.main([str(a) for a in arguments]) == 0
    return base, folder / "bundle"


@pytest.fixture(scope="module")
def straight(once, traces):
    """A function (kind, options of the export) -> a tiny base of this kind and its bundle."""

    @cache
    def get(kind: str, options: tuple[str, ...] = ()) -> tuple[Path, Path]:
        folder = once(f"straight {kind} {options}", lambda folder: exported(folder, kind, options))
        return folder / "base", folder / "bundle"

    return get


def compare(
    base: Path, bundle: Path, steps: int, height: int, width: int, ours=None, prepare=None, loras=None, **theirs
) -> None:
    """Check the latents after every step and the image of a bundle against diffusers' pipeline.

    `ours` and `theirs` are further arguments, the same if `ours` is None; `prepare` changes diffusers' pipeline;
    `loras` are files with scales for the bundle's slots.
    """
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if prepare is not None:
        prepare(pipe)
    common = {"prompt": "a red circle", "height": height, "width": width, "num_inference_steps": steps}
    expected, got = [], []

    def keep(_pipe, _step, _timestep, tensors):
        expected.append(tensors["latents"].numpy().copy())
        return tensors

    image = pipe(
        **common,
        **theirs,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=Bundle.open(bundle).manifest.text.max_sequence_length,
        callback_on_step_end=keep,
        output_type="np",
    ).images
    with Pipeline.load(bundle) as made:
        named = {made.load_lora(file): scale for file, scale in (loras or {}).items()}
        output = made(
            **common,
            **(theirs if ours is None else ours),
            seed=5,
            loras=named,
            output_type="numpy",
            callback_on_step_end=lambda _, latents: got.append(latents.copy()),
        )
    assert not [w for w in output.warnings if "was cut" in w]
    assert len(got) == len(expected) == steps
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(a - b).max() <= LATENTS * np.abs(b).max(), f"step {i}"
    assert np.abs(output.images - image).max() <= IMAGE


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 8, 28])
@pytest.mark.parametrize("kind", ["flux", "schnell"])
def test_flux_is_diffusers(straight, kind, steps):
    base, bundle = straight(kind)
    guidance = {"guidance_scale": 2.5} if kind == "flux" else {}
    compare(base, bundle, steps, 64, 96, **guidance)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("cfg", [True, False])
def test_qwen_is_diffusers(straight, cfg, steps):
    base, bundle = straight("qwen", ("--steps", "8"))
    guidance = {"negative_prompt": "blurred, ugly", "true_cfg_scale": 4.0} if cfg else {"true_cfg_scale": 1.0}
    compare(base, bundle, steps, 96, 64, **guidance)


@pytest.mark.slow
def test_explicit_sigmas_are_diffusers(straight):
    levels = [1.0, 0.7, 0.4, 0.1]
    base, bundle = straight("flux", ("--sigmas", ",".join(map(str, levels))))
    compare(base, bundle, 4, 48, 80, ours={}, sigmas=levels)


#: What a schedule is for -> the settings of its scheduler.
SCHEDULES = {
    "flux dev": {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    "flux schnell": {"shift": 1.0, "use_dynamic_shifting": False},
    "qwen": {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 1.5, "max_shift": 3.0},
    "fixed with terminal": {"shift": 2.5, "shift_terminal": 0.05},
    "lightning": {"use_dynamic_shifting": True, "base_shift": math.log(3), "max_shift": math.log(3)},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_diffusers(tmp_path, name):
    config = SCHEDULES[name]
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.save_pretrained(tmp_path / "scheduler")
    student = SimpleNamespace(
        family="flux", base=Resolved("base", tmp_path, None), config={"guidance_embeds": True}, sampler="linear"
    )
    schedule, _ = base_schedule(student)
    for height, width in ((256, 256), (1024, 1024), (1664, 928)):
        tokens = height * width // 256
        mu = calculate_shift(
            tokens,
            scheduler.config.base_image_seq_len,
            scheduler.config.max_image_seq_len,
            scheduler.config.base_shift,
            scheduler.config.max_shift,
        )
        for steps in (2, 4, 8, 28, 50):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            # diffusers rounds to float32 four to eight times on the way, each by half of 6e-8 of a number up to 1,
            # and the stretch to a terminal multiplies the error by at most 1 / (1 - last sigma) < 1.1.
            np.testing.assert_allclose(sigmas(steps, schedule, tokens), scheduler.sigmas.numpy(), rtol=0, atol=5e-7)


#: Linears of a LoRA such as FLUX.1-Turbo-Alpha's: also the last layer, which an ArcFlow student does not have.
TARGETS = {
    "transformer.transformer_blocks.0.attn.to_q": (64, 64),
    "transformer.single_transformer_blocks.1.proj_mlp": (256, 64),
    "transformer.x_embedder": (64, 64),
    "transformer.proj_out": (64, 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("slots", [False, True])
def test_a_lora_is_diffusers(straight, tmp_path, slots):
    """Merged at export and given at the request."""
    lora = make_style(tmp_path / "turbo.safetensors", TARGETS, rank=4)
    options = ("--lora-slots", "all") if slots else ("--lora", f"{lora}:0.5")
    base, bundle = straight("flux", ("--steps", "8", *options)) if slots else exported(tmp_path, "flux", options)

    def prepare(pipe):
        pipe.load_lora_weights(lora, adapter_name="turbo")
        pipe.set_adapters(["turbo"], [0.5])

    compare(base, bundle, 8, 64, 64, prepare=prepare, loras={lora: 0.5} if slots else None)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 8])
def test_lightning_is_diffusers(straight, steps):
    """With the scheduler of Qwen-Image-Lightning's own example, and without guidance."""
    base, bundle = straight("qwen", ("--schedule", "lightning", "--steps", "8,4"))

    def prepare(pipe):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(
            base_shift=math.log(3), max_shift=math.log(3), max_image_seq_len=8192, use_dynamic_shifting=True
        )

    compare(base, bundle, steps, 64, 80, {}, prepare=prepare, true_cfg_scale=1.0)
    manifest = Bundle.open(bundle).manifest
    assert manifest.true_cfg_scale == 1.0 and "conditioner" not in manifest.parts


@pytest.mark.slow
def test_fp8_and_verify(straight, tmp_path, capsys):
    base, bundle = straight("flux", ("--steps", "3"))
    scales, quantized = tmp_path / "scales.json", tmp_path / "fp8"
    few = ["--sizes", "64x64", "--num-inference-steps", "3", "--max-sequence-length", "32", "--limit", "2"]
    for command in (
        ["verify", bundle, "--base", base, "--prompt", "a red circle"],
        ["calibrate", "--base", base, "--out", scales, *few],
        ["quantize", bundle, "--scales", scales, "--out", quantized],
        ["verify", quantized, "--against", bundle, "--limit", "2"],
    ):
        assert cli.main([str(a) for a in command]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "step 2 velocity" in out and "PASSED: every threshold holds" in out


@pytest.mark.slow
def test_calibration_sees_what_diffusers_does_with_both_prompts(tmp_path):
    """Hooks on diffusers' own pipeline record the linears' inputs in the two calls of each step."""
    prompt, negative = "blurred, ugly", "a red circle"
    base, scales, steps = GOLDEN / "qwen-tiny" / "base", tmp_path / "scales.json", 3
    (tmp_path / "prompts").write_text(f"{prompt}\n")
    size = ["--sizes", "96x64", "--num-inference-steps", str(steps), "--max-sequence-length", "160"]
    words = ["--prompts", str(tmp_path / "prompts"), "--negative-prompt", negative, *size]
    assert cli.main(["calibrate", "--base", str(base), "--out", str(scales), *words]) == 0
    found = Scales.load(scales)
    assert (found.negative_prompts, found.true_cfg_scale) == ((negative,), 4.0)
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    seen = {name: [] for name in found.parts["backbone"]}
    for name, peaks in seen.items():
        module = pipe.transformer.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, peaks=peaks: peaks.append(float(args[0].abs().amax())))
    pipe(
        prompt=prompt,
        negative_prompt=negative,
        true_cfg_scale=4.0,
        height=96,
        width=64,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=160,
        output_type="latent",
    )
    by_the_negative = 0
    for name, peaks in seen.items():
        first, second = peaks[::2], peaks[1::2]
        assert len(first) == len(second) == steps
        by_the_negative += any(n > p for p, n in zip(first, second, strict=True))
        expected = [max(pair) for pair in zip(first, second, strict=True)]
        # The contract for float32, as above.
        np.testing.assert_allclose(found.parts["backbone"][name].amax, expected, rtol=LATENTS)
    assert by_the_negative > 0, "some range is set by the negative prompt alone"


@pytest.mark.slow
def test_verify_guides_by_a_negative_prompt(straight, monkeypatch, capsys):
    base, bundle = straight("qwen", ("--steps", "8"))
    words = ["verify", bundle, "--base", base, "--prompt", "a red circle", "--steps", "2"]
    assert cli.main([str(w) for w in words]) == 0
    out = capsys.readouterr().out
    assert "negative text states" in out and "step 1 negative velocity" in out
    # Guidance that is left out fails, from the first step on.
    monkeypatch.setattr(runtime_straight, "guide", lambda velocity, *_: velocity)
    assert cli.main([str(w) for w in words]) == 1
    assert "end to end: latents after step 0" in "".join(
        x for x in capsys.readouterr().out.splitlines() if "FAILED" in x
    )
    # Without guidance there is no second call.
    assert cli.main([str(w) for w in [*words, "--true-cfg-scale", "1"]]) == 0
    assert "negative" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_drift_gate_guides_as_the_pipeline_does(straight):
    _, root = straight("qwen", ("--steps", "8"))
    cases = (DriftCase("a red circle", 1), DriftCase("two", 2))
    scene = ImageSettings(64, 48, 3, None, 160, "blurred, ugly", 3.0)
    stages = BundleStages(Bundle.open(root), cases, scene, "float32")
    text = stages.encode()
    batches = stages.batches(text, stages.modulation(text.pooled))
    trajectory = stages.generate(batches)
    # A layer is measured in both calls of a step.
    assert len(list(backbone_inputs(batches, trajectory, 0))) == 2 * len(batches)
    guided = {"negative_prompt": scene.negative_prompt, "true_cfg_scale": scene.true_cfg_scale}
    with Pipeline.load(root) as pipe:
        for i, case in enumerate(cases):
            alone = pipe(case.prompt, 64, 48, 3, seed=case.seed, output_type="latents", **guided).images[0]
            assert np.abs(trajectory.latents[-1][i] - alone).max() <= LATENTS * np.abs(alone).max()


@pytest.mark.slow
def test_a_base_keeps_its_conditioner_where_sigma_depends_on_the_size(straight):
    _, bundle = straight("qwen", ("--steps", "8"))
    manifest = Bundle.open(bundle).manifest
    assert manifest.modulation is None and "conditioner" in manifest.parts
    assert manifest.version == 4 and manifest.true_cfg_scale == 4.0


BASE = ["export", "--base", str(GOLDEN / "flux-tiny" / "base"), "--out", "none"]
ADAPTER = ["--adapter", str(GOLDEN / "flux-tiny" / "adapter")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*ADAPTER, "--schedule", "base"], "--schedule is for a base without --adapter; leave --schedule or"),
        ([*ADAPTER, "--sigmas", "1"], "--sigmas is for a base without --adapter; leave --sigmas or --adapter out"),
        ([*ADAPTER, "--true-cfg-scale", "4"], "--true-cfg-scale is for a base without --adapter; leave --true-cfg"),
        (["--timestep-ratio", "0.5"], "--timestep-ratio is for a student with --adapter; leave it out"),
        (["--adapter-subfolder", "x"], "--adapter-subfolder and --adapter-revision need --adapter"),
        (["--shift", "0"], "--shift must be above 0 and finite, got 0"),
        (["--true-cfg-scale", "0.5"], "--true-cfg-scale must be between 1 and 65, got 0.5"),
        (["--true-cfg-scale", "2"], "--true-cfg-scale: this model is not guided by a negative prompt; leave it out"),
        (["--schedule", "lightning"], "--schedule lightning is for Qwen-Image; leave it out for the base's own"),
        (["--sigmas", "1,x"], "--sigmas must be numbers separated by commas, got '1,x'"),
        (["--sigmas", "1,1"], "--sigmas must fall from at most 1 and stay above 0, got '1,1'"),
        (["--sigmas", "1,0.5", "--steps", "4"], "the number of steps must be 2, that of --sigmas, got 4; leave"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*BASE, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"_class_name": "DDIMScheduler"},
            "_class_name must be 'FlowMatchEulerDiscreteScheduler', got 'DDIMScheduler'",
        ),
        ({"use_karras_sigmas": True}, "use_karras_sigmas must be false, got True: it is not supported"),
        ({"time_shift_type": "cosine"}, "time_shift_type must be 'exponential' or 'linear', got 'cosine'"),
        ({"max_image_seq_len": 256}, "base_image_seq_len must be below max_image_seq_len, got 256, 256"),
        ({"base_shift": "x"}, "base_shift must be a number, 0 or more, got 'x'"),
    ],
)
def test_schedulers_that_are_refused(tmp_path, settings, message):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / SCHEDULER).write_text(json.dumps(config | settings))
    student = SimpleNamespace(family="flux", base=Resolved("base", tmp_path, None), config={"guidance_embeds": True})
    with pytest.raises(SourceError, match=re.escape(message)):
        base_schedule(student)
