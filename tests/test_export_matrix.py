"""Students of other sizes than the golden ones: an exported bundle against the student run in torch.

The bounds are the golden cases': latents within 1e-4 of the largest value, images within 1.5 grey levels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from arcflow_export.checkpoint.sources import Location
from arcflow_export.student.reference import TorchStudent
from arcflow_runtime import Pipeline
from tests.checkpoints import Sizes, make_adapter, make_base, make_style, open_student
from tests.conftest import export

#: Three students that no other test exports; `test_golden.py` has the golden ones.
pytestmark = pytest.mark.slow
PROMPTS = ["a red circle", "an old sailor in a dark street at night"]


@dataclass(frozen=True)
class Configuration:
    sizes: Sizes
    options: dict
    arguments: dict
    style: dict[str, tuple[int, int]] = field(default_factory=dict)


CONFIGURATIONS = {
    # bfloat16 files in many shards, no guidance embedding, a VAE with a quantisation layer.
    "flux-guidance-free": Configuration(
        Sizes(
            layers=1,
            single_layers=2,
            heads=3,
            text_dim=40,
            pooled_dim=24,
            guidance=False,
            dtype=torch.bfloat16,
            max_shard_size="20KB",
            prefix="transformer.",
            vae_blocks=(4, 8, 8, 16),
            vae_layers=2,
            post_quant_conv=True,
        ),
        {"opset": 23},
        {"num_inference_steps": 3, "num_images_per_prompt": 2, "height": 48, "width": 80, "max_sequence_length": 40},
    ),
    # One mode, so no gammas at all; a style LoRA on the transformer and CLIP.
    "flux-one-mode-and-lora": Configuration(
        Sizes(layers=2, heads=1, axes=(2, 4, 6), modes=1),
        {"opset": 20, "max_sequence_length": 32},
        {"num_inference_steps": 2, "height": 64, "width": 32, "guidance_scale": 2.0},
        {
            "transformer.transformer_blocks.1.attn.to_q": (12, 12),
            "transformer.single_transformer_blocks.0.proj_mlp": (48, 12),
            "text_encoder.text_model.encoder.layers.0.self_attn.v_proj": (16, 16),
        },
    ),
    # A step count that is baked is drawn; so is one that is not, through the conditioner that is kept.
    "qwen-keep-conditioner": Configuration(
        Sizes(
            family="qwen",
            layers=2,
            heads=3,
            axes=(4, 4, 8),
            text_dim=48,
            modes=5,
            max_shard_size="100KB",
            vae_blocks=(2, 4, 8, 8),
        ),
        {"opset": 20, "steps": (3,), "keep_conditioner": True},
        {"num_inference_steps": 3, "num_images_per_prompt": 2, "height": 32, "width": 80},
    ),
}


@dataclass(frozen=True)
class Built:
    configuration: Configuration
    student: TorchStudent
    plain: TorchStudent | None
    bundle: Path


@pytest.fixture(scope="module")
def get(tmp_path_factory):
    """A function name -> what was built of it, on first use."""
    return functools.cache(lambda name: build(CONFIGURATIONS[name], tmp_path_factory.mktemp(name)))


def build(configuration: Configuration, root: Path) -> Built:
    make_base(root / "base", configuration.sizes)
    make_adapter(root / "adapter", configuration.sizes)
    loras = []
    if configuration.style:
        style = make_style(root / "style.safetensors", configuration.style, alpha=1.0)
        loras = [(Location(str(style)), 1.5)]
    student = open_student(root, loras)
    plain = TorchStudent(open_student(root)) if loras else None
    return Built(configuration, TorchStudent(student), plain, export(student, root / "bundle", **configuration.options))


def compare(built: Built, arguments: dict) -> np.ndarray:
    """Draw with the bundle and image by image with torch; returns the final latents."""
    arguments = {"num_images_per_prompt": 1} | arguments
    images, height, width = arguments["num_images_per_prompt"], arguments["height"], arguments["width"]
    steps: list[np.ndarray] = []
    with Pipeline.load(built.bundle) as pipe:
        length = pipe.bundle.manifest.text.max_sequence_length
        out = pipe(
            PROMPTS,
            seed=5,
            output_type="numpy",
            callback_on_step_end=lambda _, x: steps.append(x.copy()),
            **arguments,
        )
    assert out.warnings == ()
    batch = [p for p in PROMPTS for _ in range(images)]
    # One seed draws the whole batch in one call.
    noise = torch.randn(len(batch), 16, height // 8, width // 8, generator=torch.Generator().manual_seed(5))
    for i, prompt in enumerate(batch):
        drawing = built.student.generate(
            prompt,
            height,
            width,
            arguments["num_inference_steps"],
            guidance_scale=arguments.get("guidance_scale", 3.5),
            max_sequence_length=arguments.get("max_sequence_length", length),
            noise=noise[i : i + 1],
        )
        assert len(steps) == len(drawing.steps) == arguments["num_inference_steps"]
        for got, expected in zip(steps, drawing.steps, strict=True):
            reference = expected[0].numpy()
            assert np.abs(got[i] - reference).max() <= 1e-4 * np.abs(reference).max()
        assert np.abs(out.images[i] - drawing.images[0].numpy()).max() <= 1.5 / 255
    return steps[-1]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bundle_draws_what_torch_draws(get, name):
    built = get(name)
    compare(built, built.configuration.arguments)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_other_sizes_and_step_counts(get, name):
    # The conditioner takes any step count; Qwen's bundle has 3 steps baked and the conditioner besides.
    compare(get(name), {"num_inference_steps": 4, "height": 16, "width": 48})


def test_a_stacked_lora_changes_the_picture(get):
    built = get("flux-one-mode-and-lora")
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2}
    latents = compare(built, arguments)
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    assert built.plain is not None
    without = built.plain.generate(PROMPTS[0], 32, 32, max_sequence_length=32, noise=noise[:1]).steps[-1]
    assert np.abs(latents[0] - without[0].numpy()).max() > 0.01 * np.abs(latents[0]).max()
