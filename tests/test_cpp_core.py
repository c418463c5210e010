"""The C++ core against the Python runtime: both open and refuse the same bundles, and compute the same numbers.

The core is built once per run; ARCFLOW_CPP_BUILD names a folder in which it is built already, or kept for another run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_bundle import edit_manifest, make_bundle
from safetensors.torch import save_file

from arcflow_runtime.disk import manifest
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import MANIFEST, Schedule
from arcflow_runtime.errors import BundleError
from arcflow_runtime.maths.dtypes import round_to
from arcflow_runtime.maths.noise import draw_latents, randn
from arcflow_runtime.maths.rotary import image_rotary, text_rotary
from arcflow_runtime.maths.schedule import conditioning_guidance, conditioning_timesteps, sigmas
from arcflow_runtime.maths.update import update
from tests.cpp import build_target

FLOATS = ("float32", "bfloat16", "float16")
PLACE = 2.0**-24  # half a unit in the last place of float32, relative


@pytest.fixture(scope="session")
def tool(tmp_path_factory) -> Path:
    """The program that runs one function of the core."""
    folder = Path(os.environ.get("ARCFLOW_CPP_BUILD") or tmp_path_factory.mktemp("cpp_core"))
    build_target(folder, "core_tool", "-DARCFLOW_OPENVINO=OFF")
    return folder / "tests" / "core_tool"


@pytest.fixture(scope="session")
def core(tool):
    """A function (command, arguments) -> what the tool prints as an array, float32 unless `dtype` says otherwise."""

    def run(*arguments, dtype=np.float32, stdin: bytes | None = None) -> np.ndarray:
        done = subprocess.run([str(a) for a in (tool, *arguments)], input=stdin, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return np.frombuffer(done.stdout, dtype)

    return run


def equal_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.tobytes() == np.ascontiguousarray(theirs).tobytes()


# Sizes around 16, where the transform changes, and with tails. Below 16 numbers both call the C library in float64: the
# float32 results would differ only where an error of 1e-16 crossed a rounding boundary.
@pytest.mark.parametrize("seed", [0, 42, 2**31, 2**32 + 5, 2**63, 2**64 - 1])
def test_noise_is_equal_bit_for_bit(core, seed):
    for size in (1, 5, 15, 16, 17, 31, 32, 100, 40001):
        equal_bits(core("noise", seed, size), randn(seed, (size,)))


def test_packed_noise_is_equal_bit_for_bit(core):
    equal_bits(core("latents", 5, 2, 16, 2, 8, 12), draw_latents(5, 2, 16, 8, 12, 2))
    equal_bits(core("latents", "5,6", 2, 3, 3, 6, 9), draw_latents((5, 6), 2, 3, 6, 9, 3))


@pytest.mark.parametrize(("shift", "ratio"), [(3.2, 1.0), (3, 0.5), (0.7, 0.1)])
def test_schedule_is_equal_bit_for_bit(core, shift, ratio):
    for steps in (1, 2, 3, 7, 50):
        schedule = sigmas(steps, Schedule(shift, ratio, 2))
        equal_bits(core("sigmas", steps, shift, ratio, dtype=np.float64), schedule)
        for family in ("flux", "qwen-image"):
            for dtype in FLOATS:
                seen = core("timesteps", family, dtype, steps, shift, ratio)
                equal_bits(seen, conditioning_timesteps(schedule, family, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_guidance_is_equal_bit_for_bit(core, dtype):
    for scale in (0.0, 0.1, 1.0, 3.5, 64.9):
        equal_bits(core("guidance", scale, dtype), np.array([conditioning_guidance(scale, dtype)]))


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_rounding_is_equal_bit_for_bit(core, dtype):
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        equal_bits(core("round", dtype, stdin=values.tobytes()), round_to(values, dtype))


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_rotary_tables(core, tmp_path, family):
    """Both round float64 cosines once.

    numpy's own functions and the C library's may differ in the last place of float64. Where that crosses a rounding
    boundary, the float32 numbers, at most 1, are one place of numbers below 1 apart; that is rare, and rarer still
    after a rounding to bfloat16, where it is one place of that.
    """
    bundle = make_bundle(tmp_path / "bundle", family)
    for reference, place in (("float32", PLACE), ("bfloat16", 2.0**-8)):
        edit_manifest(bundle, reference_dtype=reference)
        m = Bundle.open(bundle).manifest
        place = place if family == "flux" else PLACE
        for height, width in ((1, 1), (3, 4), (64, 37)):
            image = core("image_rotary", bundle / MANIFEST, height, width)
            text = core("text_rotary", bundle / MANIFEST, height, width, 77)
            expected_image = image_rotary(m.rotary, m.family, m.reference_dtype, height, width)
            expected_text = text_rotary(m.rotary, m.family, m.reference_dtype, height, width, 77)
            for ours, theirs in ((image, expected_image), (text, expected_text)):
                np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=0, atol=place)
                assert (ours != theirs.ravel()).mean() < 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
def test_update(core, tmp_path, dtype):
    """Coefficients are float64 on both sides and rounded once; products and sums are float32 in any order."""
    rng = np.random.default_rng(0)
    b, n, k, c, p = 2, 33, 16, 64, 4
    heads = {
        "latents": torch.from_numpy(rng.standard_normal((b, n, c), np.float32)),
        "means": torch.from_numpy(rng.standard_normal((b, n, k, c), np.float32)).to(getattr(torch, dtype)),
        "logweights": torch.from_numpy(4 * rng.standard_normal((b, n, k, p), np.float32)).to(getattr(torch, dtype)),
        "loggammas": torch.from_numpy(9 * rng.standard_normal((b, n, k - 1, p), np.float32)).to(getattr(torch, dtype)),
    }
    save_file(heads, tmp_path / "heads")
    latents, means, logweights, loggammas = (t.float().numpy() for t in heads.values())
    sigma, end = 1.0, 0.7619047619047619
    ours = core("update", tmp_path / "heads", sigma, repr(end)).reshape(latents.shape)
    theirs = update(latents, means, logweights, loggammas, sigma, sigma, end)
    # Each side is within half an ulp per coefficient, product and sum, K + 2 times, of the sum of the terms' sizes,
    # and half an ulp of the result, so both together are within twice that of each other.
    size = update(np.zeros_like(latents), -np.abs(means), logweights, loggammas, sigma, sigma, end)
    bound = 2 * PLACE * ((k + 2) * size + np.abs(theirs)) * (1 + 1e-5)
    assert (np.abs(ours - theirs) <= bound).all()


def test_canonical_json(tool, tmp_path):
    rng = np.random.default_rng(0)
    floats = rng.integers(0, 2**63, 20_000).view(np.float64)
    numbers = [x for x in floats.tolist() if np.isfinite(x)] + (10.0 ** np.arange(-30, 30)).tolist()
    numbers += [float(x) for x in rng.integers(0, 2**60, 1000)]
    numbers += [round(x, 3) for x in rng.uniform(0, 1e4, 1000).tolist()]
    value = {"numbers": numbers, "é\u007f\u2028\U0001f600": ['"\\/\b\f\n\r\t\x00', 2**63, -(2**63), True, None], "": {}}
    path = tmp_path / "value.json"
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1))
    done = subprocess.run([tool, "canonical", path], capture_output=True, text=True, check=True)
    assert done.stdout == json.dumps(value, sort_keys=True, separators=(",", ":"))


@pytest.fixture
def both(tool):
    """Opens a bundle with both readers, which must agree on whether it is valid: C++'s error text, or None."""

    def open_bundle(root: Path, check: str = "full") -> str | None:
        done = subprocess.run([tool, "open", root, check], capture_output=True, text=True)
        error = None
        try:
            Bundle.open(root, check)
        except BundleError as e:
            error = str(e)
        assert (done.returncode, done.stdout) == ((2, "") if error else (0, "ok"))
        return done.stderr or None

    return open_bundle


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_opens_what_python_opens(both, core, tmp_path, family):
    root = make_bundle(tmp_path / "bundle", family, baked=(2, 4))
    assert both(root) is None
    edit_manifest(root, schedule__shift=1e-06, rotary__theta=1e16, provenance__command="é \u2028 \U0001f600")
    assert both(root) is None
    edit_manifest(root, provenance__vae={"name": "taef1", "revision": None, "sha256": "0" * 64, "scale": None})
    assert both(root) is None
    np.testing.assert_array_equal(core("modulation", root), [2.0] * 10 + [4.0] * 20)


FLOATS_TEXT = '["float32", "float16", "bfloat16"]'
DTYPES_TEXT = '["float32", "float16", "bfloat16", "int64", "uint8"]'
INTEGER = "must be an integer of at least 0"
QUANTIZED = "parts.backbone: quantization"
INT8 = {"format": "int8", "layers": ["a"], "policy": "0" * 64, "scales": None}
#: Changes of a manifest, and the error without the file's name and "; export the bundle again".
CHANGES = [
    ({"family": "sd"}, 'family must be one of ["flux", "qwen-image"], got "sd"'),
    ({"version": 2}, "version must be 1 for these slots and formats (B14, B15), got 2"),
    ({"version": 4}, "version must be 1 for these slots and formats (B14, B15), got 4"),
    ({"version": 5}, "version must be 1, 2, 3 or 4, got 5; update arcflow"),
    ({"version": "1"}, 'version must be 1, 2, 3 or 4, got "1"'),
    ({"opset": 1.5}, f"opset {INTEGER}, got 1.5"),
    ({"guidance": None}, "guidance must be true or false, got null"),
    ({"surprise": 1, "other": 2}, 'unknown keys ["other", "surprise"]; the known keys are ["dtype", "family", '),
    ({"latents": ...}, 'missing keys ["latents"]'),
    ({"schedule__shift": "3.2"}, 'schedule: shift must be a number, got "3.2"'),
    ({"schedule__timestep_ratio": 0}, "schedule: timestep_ratio must be above 0 and at most 1, got 0.0"),
    ({"schedule__extra": {"a": [1.5, None, True, "it's"]}}, 'schedule: unknown keys ["extra"]; the known keys are '),
    ({"rotary__axes_dims": [8, 12]}, "rotary: axes_dims must be three even sizes, got [8, 12]"),
    ({"rotary__axes_dims": [8, "12", 12]}, f'rotary: axes_dims[1] {INTEGER}, got "12"'),
    ({"text__clip_tokens": None}, "text: clip_tokens must be given for a flux bundle, got null"),
    ({"text__drop_tokens": None}, f"text: drop_tokens {INTEGER}, got null"),
    ({"text__template": 5}, "text: template must be a string or null, got 5"),
    ({"ranges__batch__min": 5}, 'ranges: batch must be min and max with 1 <= min <= max, got {"min": 5, "max": 4}'),
    ({"ranges__width_px__max": 100}, 'ranges: width_px must be multiples of 16, got {"min": 16, "max": 100}'),
    ({"latents__logweights_channels": 3}, "latents: logweights_channels must be patch_size squared, 4, got 3"),
    ({"dtype": "uint8"}, f'dtype must be one of {FLOATS_TEXT}, got "uint8"'),
    (
        {"tokenizers": {"tokenizer": "tokenizer.json"}},
        'tokenizers must be given for ["tokenizer", "tokenizer_2"], got ["tokenizer"]',
    ),
    (
        {"parts__backbone": ...},
        'a flux bundle must have parts ["backbone", "conditioner", "text_encoder", "text_encoder_2", "vae_decoder"], '
        'missing ["backbone"]',
    ),
    ({"parts__backbone__weights": "other"}, '"other" is used but not listed under "files"'),
    ({"parts__backbone__inputs": {}}, "parts.backbone: inputs must be a list, got {}"),
    ({"parts__backbone__outputs": [1]}, "parts.backbone: outputs[0] must be an object, got 1"),
    (
        {"parts__backbone__quantization": {"format": "fp8_e4m3", "layers": [], "policy": "", "scales": ""}},
        f"{QUANTIZED}: layers must be at least one, or no quantization, got []",
    ),
    (
        {"parts__backbone__quantization": {"format": "fp8_e4m3", "layers": ["a", "a"], "policy": "", "scales": ""}},
        f'{QUANTIZED}: layers must be named once each, got ["a"]',
    ),
    (
        {"parts__backbone__quantization": {"format": "fp8_e4m3", "layers": ["a"], "policy": "x", "scales": ""}},
        f'{QUANTIZED}: policy must be a SHA-256, got "x"',
    ),
    ({"parts__backbone__quantization": INT8}, "version must be 3 for these slots and formats (B14, B15), got 1"),
    (
        {"version": 3, "parts__backbone__quantization": INT8 | {"scales": "0" * 64}},
        f"{QUANTIZED}: scales must be null for a format without calibration, got ",
    ),
    (
        {"version": 3, "parts__backbone__quantization": INT8 | {"formats": {"b": "fp8_e4m3"}}},
        f'{QUANTIZED}: formats must be given for names of layers only, got ["b"]',
    ),
    (
        {"version": 3, "parts__backbone__quantization": INT8 | {"formats": {"a": "fp8_e4m3"}}},
        f"{QUANTIZED}: scales must be a SHA-256, got null",
    ),
    (
        {"version": 2, "parts__backbone__quantization": INT8 | {"formats": {"a": "int8"}}},
        f'{QUANTIZED}: unknown keys ["formats"]',
    ),
    ({"modulation": {"file": "gone", "num_inference_steps": [2]}}, '"gone" is used but not listed under "files"'),
    ({"provenance__base__scale": "x"}, 'provenance: base: scale must be a number or null, got "x"'),
    ({"provenance__loras": None}, "provenance: loras must be a list, got null"),
    ({"files__../x": {"bytes": 1, "sha256": ""}}, 'file name "../x" leaves the bundle or has characters it may not'),
    ({"files__engines/x": {"bytes": 1, "sha256": ""}}, 'file "engines/x" must not be in engines/, which is for built'),
    ({"parts__backbone__precision": "int4"}, f'parts.backbone: precision must be one of {DTYPES_TEXT}, got "int4"'),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=str)
def test_wrong_manifests(both, tmp_path, changes, message):
    root = make_bundle(tmp_path / "bundle")
    edit_manifest(root, **changes)
    assert (both(root) or "").startswith(f"{root / MANIFEST}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files__backbone.onnx__bytes": 3}, "backbone.onnx must have 3 bytes, got "),
        ({"files__backbone.onnx__sha256": "0" * 64}, "backbone.onnx does not match its SHA-256 in manifest.json; "),
        ({"files__missing": {"bytes": 1, "sha256": ""}}, "missing is missing; was the bundle moved in part? "),
    ],
    ids=str,
)
def test_files_that_differ_from_the_manifest(both, tmp_path, changes, message):
    root = make_bundle(tmp_path / "bundle")
    edit_manifest(root, **changes)
    assert (both(root) or "").startswith(f"{root}/{message}")


def test_damaged_bundles(both, tmp_path):
    def fails(root: Path, message: str) -> None:
        assert (both(root) or "").startswith(f"{root}{message}")

    fails(tmp_path / "none", " is not a directory; ")
    root = make_bundle(tmp_path / "bundle")
    manifest = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text("[]")
    fails(root, '/manifest.json: format must be "arcflow-bundle"; this is not an ArcFlow bundle')
    (root / MANIFEST).write_text(manifest.replace('"shift": 3.2', '"shift": 3.3'))
    fails(root, "/manifest.json does not match its own digest; it was edited")
    (root / MANIFEST).unlink()
    fails(root, " has no manifest.json, so it is not a bundle; ")
    (root / MANIFEST).write_text(manifest)
    graph = root / "backbone.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content + b"x")
    fails(root, f"/backbone.onnx must have {len(content)} bytes, got {len(content) + 1}; it was cut or edited")
    graph.write_bytes(b"x" * len(content))
    fails(root, "/backbone.onnx does not match its SHA-256 in manifest.json; it was edited or damaged")
    graph.unlink()
    fails(root, "/backbone.onnx is missing; ")
    (tmp_path / "outside").write_bytes(content)
    graph.symlink_to("../outside")
    fails(root, "/backbone.onnx is a link that leaves the bundle; copy the file into it")


#: The classes of Python's manifest by their place in it.
CLASSES = {
    "": manifest.Manifest,
    "schedule": manifest.Schedule,
    "latents": manifest.Latents,
    "rotary": manifest.Rotary,
    "text": manifest.PromptFormat,
    "ranges": manifest.Ranges,
    "ranges__batch": manifest.SizeRange,
    "parts__backbone": manifest.Part,
    "parts__backbone__quantization": manifest.Quantization,
    "parts__backbone__lora": manifest.LoraSlots,
    "parts__backbone__lora__layers__a": manifest.SlotLayer,
    "modulation": manifest.ModulationTable,
    "files__backbone.onnx": manifest.FileEntry,
    "provenance": manifest.Provenance,
    "provenance__base": manifest.Source,
}


#: Keys of version 4 by their place; tests/test_cpp_straight.py has bundles of that version.
STRAIGHT_KEYS = {"": {"sampler", "true_cfg_scale"}, "schedule": {"dynamic_shift", "terminal", "sigmas"}}


@pytest.mark.parametrize(("place", "class_"), CLASSES.items(), ids=str)
def test_both_know_the_same_keys(both, tmp_path, place, class_):
    root = make_bundle(tmp_path / "bundle", baked=(2,))
    quantization = {"format": "fp8_e4m3", "layers": ["a"], "policy": "0" * 64, "scales": "0" * 64}
    layers = {"a": {"in_features": 3, "out_features": 2, "dtype": "float32"}}
    slots = {"layers": layers, "rank_multiple": 8, "max_rank": 16, "unread": []}
    edit_manifest(root, version=3, parts__backbone__quantization=quantization, parts__backbone__lora=slots)
    edit_manifest(root, **{f"{place}__surprise" if place else "surprise": 1})
    found = re.search(r'unknown keys \["surprise"\]; the known keys are (\[.*\])', both(root) or "")
    assert found
    known = {field.name for field in dataclasses.fields(class_)} | (set() if place else {"format", "version"})
    assert set(json.loads(found[1])) == known - STRAIGHT_KEYS.get(place, set())


def test_files_above_64_mib_are_hashed_by_the_full_check_only(both, tmp_path):
    root = make_bundle(tmp_path / "bundle")
    size = (64 << 20) + 1
    with (root / "backbone.safetensors").open("wb") as f:
        f.truncate(size)  # a hole, so that it takes no space
    edit_manifest(root, **{"files__backbone.safetensors__bytes": size})
    assert both(root, "fast") is None
    assert "does not match its SHA-256" in (both(root, "full") or "")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", 'the header must begin with "{"'),
        (b'{"num_inference_steps_2": {"dtype": "F32", "shape": [2, 5], "data_offsets": [0, 20]}}', "span the bytes"),
        (b'{"num_inference_steps_2": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}', "must take the 40"),
        (b'{"num_inference_steps_2": {"dtype": "I32", "shape": [2, 5], "data_offsets": [0, 40]}}', "is not supported"),
        (b'{"num_inference_steps_2": {"dtype": "F32", "shape": [1, 10], "data_offsets": [0, 40]}}', "of shape [2, 5]"),
    ],
)
def test_a_damaged_modulation_table(tool, tmp_path, header, message):
    root = make_bundle(tmp_path / "bundle", "qwen-image", baked=(2,))
    data = struct.pack("<Q", len(header)) + header + bytes(40)
    (root / "modulation.safetensors").write_bytes(data)
    edit_manifest(
        root, **{"files__modulation.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    )
    done = subprocess.run([tool, "modulation", root], capture_output=True, text=True)
    assert done.returncode == 2
    assert str(root / "modulation.safetensors") in done.stderr and message in done.stderr
    assert done.stderr.endswith("export the bundle again")
