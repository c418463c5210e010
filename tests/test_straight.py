"""Bundles of bases without an adapter, against diffusers' own pipelines and scheduler."""

from __future__ import annotations

import json
import math
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
from arcflow_export.student.schedule import base_schedule
from arcflow_runtime import Pipeline, cli
from arcflow_runtime.maths.schedule import sigmas
from tests.checkpoints import GOLDEN, Sizes, make_base

SCHEDULER = Path("scheduler") / "scheduler_config.json"
#: The project's contract for float32: latents within 1e-4 of the largest value, images within 1.5 grey levels.
LATENTS, IMAGE = 1e-4, 1.5 / 255
SMALL = ["--max-px", "256", "--max-sequence-length", "32"]


def with_scheduler(base: Path, **changes) -> Path:
    path = base / SCHEDULER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return base


@pytest.fixture(scope="module")
def straight(once, traces):
    """A function (kind, options of the export, scheduler settings) -> a tiny base of this kind and its bundle."""

    @cache
    def get(kind: str, options: tuple[str, ...] = (), settings: str = "{}") -> tuple[Path, Path]:
        def make(folder: Path) -> None:
            base = folder / "base"
            if kind == "schnell":
                make_base(base, Sizes(guidance=False))
                with_scheduler(base, use_dynamic_shifting=False, shift=1.0)
            else:
                shutil.copytree(GOLDEN / f"{kind}-tiny" / "base", base)
            with_scheduler(base, **json.loads(settings))
            arguments = ["export", "--base", base, "--out", folder / "bundle", *SMALL, *options]
            assert cli.main([str(a) for a in arguments]) == 0

        folder = once(f"straight {kind} {options} {settings}", make)
        return folder / "base", folder / "bundle"

    return get


def compare(base: Path, bundle: Path, steps: int, height: int, width: int, ours: dict | None = None, **theirs) -> None:
    """Check the latents after every step and the image of a bundle against diffusers' pipeline."""
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    common = {"prompt": "a red circle", "height": height, "width": width, "num_inference_steps": steps}
    expected, got = [], []

    def keep(_pipe, _step, _timestep, tensors):
        expected.append(tensors["latents"].numpy().copy())
        return tensors

    generator = torch.Generator().manual_seed(5)
    image = pipe(
        **common, **theirs, generator=generator, max_sequence_length=32, callback_on_step_end=keep, output_type="np"
    ).images
    with Pipeline.load(bundle) as made:
        output = made(
            **common,
            **(theirs if ours is None else ours),
            seed=5,
            output_type="numpy",
            callback_on_step_end=lambda _, latents: got.append(latents.copy()),
        )
    assert len(got) == len(expected) == steps
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert np.abs(a - b).max() <= LATENTS * np.abs(b).max(), f"step {i}"
    assert np.abs(output.images - image).max() <= IMAGE


@pytest.mark.parametrize("steps", [1, 4, 8, 28])
@pytest.mark.parametrize("kind", ["flux", "schnell"])
def test_flux_is_diffusers(straight, kind, steps):
    base, bundle = straight(kind)
    guidance = {"guidance_scale": 2.5} if kind == "flux" else {}
    compare(base, bundle, steps, 64, 96, **guidance)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("cfg", [True, False])
def test_qwen_is_diffusers(straight, cfg, steps):
    base, bundle = straight("qwen", ("--steps", "8"))
    guidance = {"negative_prompt": "blurred, ugly", "true_cfg_scale": 4.0} if cfg else {"true_cfg_scale": 1.0}
    compare(base, bundle, steps, 96, 64, **guidance)


def test_explicit_sigmas_are_diffusers(straight):
    levels = [1.0, 0.7, 0.4, 0.1]
    base, bundle = straight("flux", ("--sigmas", ",".join(map(str, levels))))
    compare(base, bundle, 4, 48, 80, ours={}, sigmas=levels)


#: Settings of a scheduler, and what they are the schedule of.
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
