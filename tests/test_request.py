import re

import numpy as np
import pytest
from fake_bundle import FakeBackend, make_bundle

from arcflow_runtime import Pipeline, RequestError
from arcflow_runtime.disk.bundle import Bundle


def open_fake(root):
    pipe = Pipeline(Bundle.open(root), FakeBackend())
    pipe.backend = pipe._parts._backend
    return pipe


@pytest.fixture(scope="module")
def flux_root(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("request") / "flux")


@pytest.fixture
def flux(flux_root):
    return open_fake(flux_root)


GOOD = {"prompt": "x", "height": 32, "width": 32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt must be a string or a list of strings, got 3"),
        ({"prompt": ["a", 3]}, "prompt must be a string or a list of strings, got ['a', 3]"),
        (
            {"prompt": []},
            "prompt must hold at least one string, got an empty list; '' is allowed as a prompt",
        ),
        (
            {"prompt": "a\ud800"},
            "prompt must be valid Unicode, got a lone surrogate at position 1; decode the text as UTF-8",
        ),
        ({"height": 40}, "height must be a multiple of 16, got 40; the nearest is 32"),
        ({"width": 2}, "width must be a multiple of 16, got 2; the nearest is 16"),
        (
            {"width": 144},
            "width must be between 16 and 128 for this bundle, got 144; "
            "export a bundle with a wider range or choose another size",
        ),
        ({"height": "64"}, "height must be an integer, got '64'"),
        ({"height": 64.0}, "height must be an integer, got 64.0"),
        ({"height": True}, "height must be an integer, got True"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be between 1 and 1000, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer, got 2.5"),
        ({"guidance_scale": "3"}, "guidance_scale must be a number, got '3'"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be between 0 and 65, got nan"),
        ({"guidance_scale": -1}, "guidance_scale must be between 0 and 65, got -1"),
        ({"seed": "1"}, "seed must be an integer, got '1'; give an integer, or a list of one per image"),
        (
            {"seed": 2**64},
            f"seed must be between {-(2**63)} and {2**64 - 1}, got {2**64}; "
            "give an integer, or a list of one per image",
        ),
        ({"seed": [1, 2]}, "seed must be an integer or a list of 1, one per image, got a list of 2"),
        ({"seed": [1.5]}, "seed[0] must be an integer, got 1.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        (
            {"num_images_per_prompt": 5},
            "prompts times num_images_per_prompt must be between 1 and 4 for this bundle, got 1 * 5 = 5; "
            "ask for fewer images at a time",
        ),
        ({"max_sequence_length": 65}, "max_sequence_length must be between 1 and 64, got 65"),
        ({"prompt": None}, "prompt must be a string or a list of strings, got None"),
        ({"output_type": "pt"}, "output_type must be one of ['pil', 'numpy', 'latents'], got 'pt'"),
    ],
)
def test_bad_requests_run_nothing(flux, arguments, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        flux(**(GOOD | arguments))
    assert flux.backend.runs == []


def test_a_student_without_guidance_ignores_it_and_says_so(tmp_path):
    pipe = open_fake(make_bundle(tmp_path / "b", "qwen-image"))
    out = pipe("x", guidance_scale=3.5)
    assert out.warnings == ("this student takes no guidance; guidance_scale 3.5 was ignored",)
    assert pipe("x").warnings == ()


def test_numpy_integers_are_integers(flux):
    output = flux("x", height=np.int64(32), width=np.int32(32), seed=np.uint32(7))
    assert output.seed == 7
    assert type(output.seed) is int
