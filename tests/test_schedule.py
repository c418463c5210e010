import numpy as np
import pytest

from arcflow_runtime.disk.manifest import Schedule
from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.dtypes import round_to
from arcflow_runtime.maths.schedule import conditioning_guidance, conditioning_timesteps, sigmas

RELEASED = Schedule(3.2, 1.0, 2)


def test_two_steps():
    np.testing.assert_allclose(sigmas(2, RELEASED), [1, 3.2 * 0.5 / 2.1, 0], rtol=1e-15)


def test_one_step_and_timestep_ratio():
    assert sigmas(1, RELEASED).tolist() == [1, 0]
    t = np.array([1, 1 - 1 / 1.5])
    np.testing.assert_allclose(sigmas(2, Schedule(3.2, 0.5, 2)), [*(3.2 * t / (1 + 2.2 * t)), 0], rtol=1e-15)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps):
    with pytest.raises(RequestError, match=rf"^num_inference_steps must be at least 1, got {steps}; the default is 2$"):
        sigmas(steps, RELEASED)


def test_what_the_embedding_sees():
    two = sigmas(2, RELEASED)
    assert conditioning_timesteps(two, "flux", "bfloat16").tolist() == [1000, 760]
    assert conditioning_timesteps(two, "qwen-image", "bfloat16").tolist() == [1000, 761.71875]
    expected = np.float32(two[1]) * np.float32(1000)
    for family in ("flux", "qwen-image"):
        seen = conditioning_timesteps(two, family, "float32")
        assert seen.dtype == np.float32
        assert seen.tolist() == [1000, expected]
    assert conditioning_guidance(3.5, "bfloat16") == 3504
    assert conditioning_guidance(3.5, "float32") == 3500


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_conditioning_equals_the_reference_for_every_step_count(dtype):
    torch = pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = getattr(torch, dtype)
    for steps in range(1, 65):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.2)
        scheduler.set_timesteps(sigmas=(1 - np.arange(steps) / steps).tolist())
        sigma = scheduler.timesteps.float() / 1000
        ours = sigmas(steps, RELEASED)
        # The scheduler works in float32: shift, divide, times 1000 and back are four roundings.
        np.testing.assert_allclose(ours[:-1], sigma.numpy(), rtol=4 * 2**-24)
        flux = (sigma.to(kind) * 1000).float().numpy()
        qwen = (sigma.to(kind).float() * 1000).numpy()
        rtol = 5 * 2**-24 if dtype == "float32" else 0
        np.testing.assert_allclose(conditioning_timesteps(ours, "flux", dtype), flux, rtol=rtol)
        np.testing.assert_allclose(conditioning_timesteps(ours, "qwen-image", dtype), qwen, rtol=rtol)


def test_golden_timesteps():
    from fake_bundle import GOLDEN
    from safetensors.numpy import load_file

    for family, name in (("flux", "flux-tiny"), ("qwen-image", "qwen-tiny")):
        golden = load_file(GOLDEN / name / "case0.safetensors")
        seen = np.concatenate([golden[f"step{i}.timestep"] for i in range(2)])
        ours = conditioning_timesteps(sigmas(2, RELEASED), family, "float32")
        scale = 1000 if seen.max() <= 1 else 1
        # One rounding to float32 here; shift, divide and scale there.
        np.testing.assert_allclose(ours, seen * scale, rtol=4 * 2**-24)


def test_rounding_equals_torch():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    x = np.concatenate([bits, ties]).view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 60000)]
    for dtype in ("float32", "float16", "bfloat16"):
        theirs = torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(round_to(x, dtype), theirs)
    assert round_to(3.0078125, "bfloat16").shape == ()


def test_rounding_to_no_such_dtype():
    with pytest.raises(ValueError, match=r"^dtype must be float32, float16 or bfloat16, got 'int8'$"):
        round_to(1.0, "int8")
