"""Optimisation profiles: what sizes may be asked for, and what shapes they become."""

from __future__ import annotations

import dataclasses

import pytest
from fake_bundle import edit_manifest, make_bundle

from arcflow_runtime import Bundle
from arcflow_runtime.build.profiles import Size, default_size, make_profiles, parse_batch, parse_sizes
from arcflow_runtime.disk.engine_record import ShapeRange
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.errors import BundleError, RequestError

ONE = SizeRange(1, 1)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("shapes") / "flux")).manifest


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("shapes") / "qwen", "qwen-image", baked=(2,))).manifest


def static(*shape):
    return ShapeRange(shape, shape, shape)


def test_one_size_and_batch_is_static(flux):
    (profile,) = make_profiles(flux, "backbone", parse_sizes("64x48"), ONE)
    assert profile["latents"] == static(1, 12, 64)
    assert profile["image_rotary"] == static(2, 12, 16)
    assert profile["modulation"] == static(1, 5)
    # The text's length is the request's.
    assert profile["encoder_hidden_states"] == ShapeRange((1, 1, 8), (1, 64, 8), (1, 64, 8))
    assert make_profiles(flux, "vae_decoder", parse_sizes("64x48"), ONE) == ({"latents": static(1, 4, 3, 64)},)


def test_no_size_is_all_that_the_bundle_allows(flux):
    (profile,) = make_profiles(flux, "backbone", (), SizeRange(1, 4))
    # 16-256 by 16-128 pixels; the best is the nearest to 1024.
    assert profile["latents"] == ShapeRange((1, 1, 64), (1, 128, 64), (4, 128, 64))
    assert make_profiles(flux, "vae_decoder", (), ONE) == (
        {"latents": ShapeRange((1, 1, 1, 64), (1, 16, 8, 64), (1, 16, 8, 64))},
    )


@pytest.mark.parametrize(
    ("allowed", "default"),
    [((16, 2048), (16, 1024)), ((16, 768), (16, 768)), ((512, 512), (512, 512)), ((1280, 2048), (1280, 1280))],
)
def test_no_size_stops_at_1024_pixels(flux, allowed, default):
    ranges = dataclasses.replace(flux.ranges, height_px=SizeRange(*allowed), width_px=SizeRange(16, 2048))
    manifest = dataclasses.replace(flux, ranges=ranges)
    assert default_size(manifest) == Size(SizeRange(*default), SizeRange(16, 1024))
    (profile,) = make_profiles(manifest, "vae_decoder", (), ONE)
    low, high = (px // 16 for px in default)
    assert profile["latents"] == ShapeRange((1, low, 1, 64), (1, high, 64, 64), (1, high, 64, 64))


def test_each_size_is_a_profile(flux):
    static_one, ranged = make_profiles(flux, "backbone", parse_sizes("64,32-64x128"), SizeRange(2, 4))
    assert static_one["latents"] == ShapeRange((2, 16, 64), (2, 16, 64), (4, 16, 64))
    assert ranged["latents"] == ShapeRange((2, 16, 64), (2, 32, 64), (4, 32, 64))


def test_parts_without_a_size_have_one_profile(flux):
    sizes = parse_sizes("64,128")
    (encoder,) = make_profiles(flux, "text_encoder_2", sizes, SizeRange(1, 4))
    assert encoder == {"input_ids": ShapeRange((1, 1), (1, 64), (1, 64))}
    (conditioner,) = make_profiles(flux, "conditioner", sizes, SizeRange(2, 4))
    assert conditioner["timesteps"] == ShapeRange((1,), (2,), (8,))
    # A batch of one prompt has one pooled vector.
    assert conditioner["pooled_projections"] == ShapeRange((1, 6), (1, 6), (4, 6))
    assert conditioner["guidance"] == ShapeRange((1,), (1,), (4,))


def test_the_template_comes_before_the_prompt(qwen):
    (encoder,) = make_profiles(qwen, "text_encoder", (), ONE)
    assert encoder == {"input_ids": ShapeRange((1, 4), (1, 67), (1, 67))}


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1024", [(1024, 1024, 1024, 1024)]),
        ("1024x768", [(1024, 1024, 768, 768)]),
        ("512-1536", [(512, 1536, 512, 1536)]),
        ("512-1024x768,512", [(512, 1024, 768, 768), (512, 512, 512, 512)]),
        ("512,512", [(512, 512, 512, 512)]),
    ],
)
def test_sizes(text, sizes):
    assert parse_sizes(text) == tuple(Size(SizeRange(a, b), SizeRange(c, d)) for a, b, c, d in sizes)


@pytest.mark.parametrize("text", ["", "a", "64x", "64-", "-64", "64,", "1-2-3", "64.0"])
def test_sizes_that_are_none(text):
    with pytest.raises(RequestError, match=r"^--resolutions must be a number or a range such as 1-4, got "):
        parse_sizes(text)


def test_other_bad_sizes():
    with pytest.raises(RequestError, match=r"^--resolutions must be HEIGHTxWIDTH such as 1024x768, got '64x64x64'$"):
        parse_sizes("64x64x64")
    with pytest.raises(RequestError, match=r"^--resolutions: a range must be LOW-HIGH with 1 <= LOW <= HIGH, got "):
        parse_sizes("128-64")
    with pytest.raises(RequestError, match=r"^--batch must be a number or a range such as 1-4, got 'two'$"):
        parse_batch("two")
    with pytest.raises(RequestError, match=r"^--batch: a range must be LOW-HIGH"):
        parse_batch("0")


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ("100", "1", "^--resolutions: height must be a multiple of 16, got 100$"),
        ("64x100", "1", "^--resolutions: width must be a multiple of 16, got 100$"),
        (
            "64x128-256",
            "1",
            "^--resolutions: width must be between 16 and 128 for this bundle, got 128-256; export a bundle",
        ),
        ("64", "1-5", "^--batch must be between 1 and 4 for this bundle, got 1-5; export a bundle with a wider range"),
    ],
)
def test_outside_of_the_bundle(flux, sizes, batch, message):
    with pytest.raises(RequestError, match=message):
        make_profiles(flux, "backbone", parse_sizes(sizes), parse_batch(batch))


def test_an_input_that_the_format_does_not_have(tmp_path):
    root = make_bundle(tmp_path / "bundle")
    edit_manifest(root, parts__vae_decoder__inputs=[{"name": "z", "dtype": "float32", "shape": ["B"]}])
    with pytest.raises(
        BundleError,
        match=r"^vae_decoder: input z must have the axes of rule B9 \(docs/bundle.md\), got \['B'\]; export",
    ):
        make_profiles(Bundle.open(root).manifest, "vae_decoder", (), ONE)
