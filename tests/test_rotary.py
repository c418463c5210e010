import numpy as np
import pytest

from arcflow_runtime.disk.manifest import Rotary
from arcflow_runtime.maths.rotary import image_rotary, text_rotary

SIZES = [(4, 4), (6, 4), (5, 7), (1, 1), (64, 48)]
RELEASED = {"flux": Rotary(10000.0, (16, 56, 56)), "qwen-image": Rotary(10000.0, (16, 56, 56))}
TINY = Rotary(10000.0, (8, 12, 12))


@pytest.mark.parametrize("rotary", [TINY, RELEASED["flux"]])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_flux_equals_diffusers(rotary, h, w):
    torch = pytest.importorskip("torch")
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    ids = FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32)
    cos, sin = FluxPosEmbed(int(rotary.theta), list(rotary.axes_dims))(ids)
    ours = image_rotary(rotary, "flux", "float32", h, w)
    assert ours.dtype == np.float32
    # Both are float64 rounded once; libraries differ by about 1e-16, which may cross one boundary.
    np.testing.assert_allclose(ours, np.stack([cos[:, ::2], sin[:, ::2]]), rtol=0, atol=2**-24)
    half = image_rotary(rotary, "flux", "bfloat16", h, w)
    theirs = torch.stack([cos[:, ::2], sin[:, ::2]]).bfloat16().float().numpy()
    # A last place of float32 on a bfloat16 boundary moves by one place of bfloat16, at most 2**-8.
    assert (half != theirs).mean() < 1e-3
    np.testing.assert_allclose(half, theirs, rtol=0, atol=2**-8)


def test_flux_text_has_no_position():
    table = text_rotary(TINY, "flux", "float32", 4, 4, 9)
    assert table.shape == (2, 9, 16)
    assert (table[0] == 1).all()
    assert (table[1] == 0).all()


@pytest.mark.parametrize("rotary", [TINY, RELEASED["qwen-image"]])
@pytest.mark.parametrize(("h", "w"), SIZES)
def test_qwen_equals_diffusers(rotary, h, w):
    torch = pytest.importorskip("torch")
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    embed = QwenEmbedRope(int(rotary.theta), list(rotary.axes_dims), scale_rope=True)
    image, text = embed([(1, h, w)], device=torch.device("cpu"), max_txt_seq_len=40)
    ours = [
        image_rotary(rotary, "qwen-image", "float32", h, w),
        text_rotary(rotary, "qwen-image", "float32", h, w, 40),
    ]
    for mine, theirs in zip(ours, (image, text), strict=True):
        expected = np.stack([theirs.real.numpy(), theirs.imag.numpy()])
        # diffusers' frequencies and angles are float32: theta**x, its inverse and the product round three
        # times, and the exponent's rounding counts ln(theta) = 9.2 times. Angles reach `largest` radians; cos
        # and sin pass their error on and round once.
        largest = max(h, w) + 40
        np.testing.assert_allclose(mine, expected, rtol=0, atol=(3 + 9.3) * 2**-24 * largest + 2**-23)


def test_qwen_ignores_the_reference_dtype():
    np.testing.assert_array_equal(
        image_rotary(TINY, "qwen-image", "bfloat16", 4, 4), image_rotary(TINY, "qwen-image", "float32", 4, 4)
    )


def test_tables_are_cached_and_read_only():
    table = image_rotary(TINY, "flux", "float32", 4, 4)
    assert image_rotary(TINY, "flux", "float32", 4, 4) is table
    assert not table.flags.writeable
    assert image_rotary.cache_info().maxsize is not None
