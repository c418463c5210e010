"""Every file of examples/ runs as its docstring says, and does what it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow_runtime import Pipeline
from tests.conftest import SHAPES_OPTIONS

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The longest that an example may be, in lines.
LONGEST = 39
WRITES = {
    "batch_with_seeds": ["seed-1.png", "seed-2.png", "seed-3.png", "seed-4.png"],
    "blend_prompts": ["blend-0.0.png", "blend-0.5.png", "blend-1.0.png"],
    "low_memory": ["bundle-0-image-0.png", "bundle-0-image-1.png"],
    "read_manifest": ["summary.json"],
    "step_preview": ["final.png", "step-0.png", "step-1.png"],
    "thread_pool": ["request-0.png", "request-1.png"],
}


@pytest.fixture(scope="module")
def example(bundles, tmp_path_factory):
    """A function (name) that runs an example once -> the folder that it wrote to, and its output."""
    bundle, made = bundles("shapes", **SHAPES_OPTIONS), {}

    def run(name: str) -> tuple[Path, str]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(bundle), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[name] = folder, done.stdout
        return made[name]

    return run


@pytest.fixture(scope="module")
def pipe(bundles):
    with Pipeline.load(bundles("shapes", **SHAPES_OPTIONS)) as opened:
        yield opened


def test_there_is_a_test_and_a_line_in_the_table_for_each():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == sorted(WRITES)
    table = (EXAMPLES / "README.md").read_text()
    assert [name for name in names if f"[`{name}.py`]({name}.py)" not in table] == []


@pytest.mark.parametrize("name", WRITES)
def test_example(example, name):
    folder, _ = example(name)
    assert sorted(path.name for path in folder.iterdir()) == WRITES[name]
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= LONGEST


def test_low_memory_gives_the_images_of_the_ordinary_pipeline(example, pipe):
    folder, _ = example("low_memory")
    expected = pipe(["a red circle", "a blue square"], seed=[1, 2]).images
    for i, image in enumerate(expected):
        assert np.array_equal(image, Image.open(folder / f"bundle-0-image-{i}.png"))


def test_unmixed_arrays_give_the_image_of_the_prompt(example, pipe):
    folder, _ = example("blend_prompts")
    for name, prompt in (("blend-0.0", "a red circle"), ("blend-1.0", "a blue square")):
        assert np.array_equal(pipe(prompt, seed=3).images[0], Image.open(folder / f"{name}.png"))


def test_the_preview_unpacks_latents_as_the_specification_says(example, pipe):
    """Sub-pixel (dy, dx) of a token's channel c is packed channel c * 4 + 2 dy + dx: docs/bundle.md, Noise."""
    folder, _ = example("step_preview")
    (latents,) = pipe("a red heart", 64, 64, seed=7, output_type="latents").images  # 4 x 4 tokens
    grey = np.array(
        [[latents[4 * (y // 2) + x // 2, 2 * (y % 2) + x % 2 :: 4].mean() for x in range(8)] for y in range(8)]
    )
    scaled = (255 * (grey - grey.min()) / (grey.max() - grey.min())).astype(np.uint8)
    # A float32 sum in another order may move a value to the next of 256 levels. The bicubic weights of one axis have an
    # absolute sum of at most 1.25, so both axes make that 1.56 levels, which rounds to 2.
    difference = np.asarray(Image.fromarray(scaled).resize((64, 64)), int) - np.asarray(
        Image.open(folder / "step-1.png"), int
    )
    assert np.abs(difference).max() <= 2


def test_a_wrong_request_is_an_error_of_its_own(example):
    _, output = example("thread_pool")
    assert output.startswith("request 2: height must be a multiple of 16")


def test_summary_of_the_manifest(example, pipe):
    folder, _ = example("read_manifest")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["family"] == "flux"
    assert summary["steps"] == 2
    assert list(summary["parts"]) == list(pipe.bundle.manifest.parts)
