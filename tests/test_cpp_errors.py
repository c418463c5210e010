"""Every error of the C ABI: its status, its sentence, which is Python's where the rule is the same, and no crash."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_float, c_int64, c_void_p
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from arcflow_runtime import ArcFlowError
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.manifest import MANIFEST
from tests.cpp import BUNDLE_ERROR, CLOSED, ENGINE_ERROR, REQUEST_ERROR, embed, ids_of
from tests.fake_bundle import edit_manifest


def test_wrong_arguments_have_pythons_sentences(cpp_pipes, python_pipes):
    cases = [
        {"height": 40},
        {"width": 2},
        {"height": 2064},
        {"width": -16},
        {"num_inference_steps": 1001},
        {"num_inference_steps": -1},
        {"num_images_per_prompt": 33},
        {"num_images_per_prompt": -1},
        {"max_sequence_length": 513},
        {"max_sequence_length": -2},
        {"guidance_scale": 66.0},
        {"seed": [1, 2]},
    ]
    for case in [("flux-tiny", c) for c in cases] + [("qwen-tiny", {"num_inference_steps": 3})]:
        name, given = case[0], {"height": 32, "width": 32} | case[1]
        with pytest.raises(ArcFlowError) as theirs:
            python_pipes(name)("x", **given)
        seeds = given.pop("seed", [1])
        with pytest.raises(embed.ArcFlowError) as ours:
            cpp_pipes(name).draw(["x"], seeds=seeds, **given)
        assert ours.value.status == REQUEST_ERROR
        assert str(ours.value) == str(theirs.value)


def test_wrong_pointers(cpp_library, cpp_bundles, cpp_pipes):
    flux, size = cpp_pipes("flux-tiny"), ctypes.sizeof(embed.Request)
    out = c_void_p(7)

    def fails(status, code, message):
        assert status == code
        assert re.search(message, cpp_library.arcflow_last_error().decode()), cpp_library.arcflow_last_error()

    fails(cpp_library.arcflow_open(None, None, byref(out)), REQUEST_ERROR, "^bundle must not be NULL$")
    assert out.value is None
    fails(cpp_library.arcflow_open(b"x", None, None), REQUEST_ERROR, "^pipeline must not be NULL$")
    request = embed.Request(struct_size=size, guidance_scale=-1, height=32, width=32)
    draw = cpp_library.arcflow_draw
    fails(draw(None, byref(request), byref(out)), REQUEST_ERROR, "^pipeline must not be NULL$")
    fails(draw(flux.handle, None, byref(out)), REQUEST_ERROR, "^request must not be NULL$")
    fails(draw(flux.handle, byref(request), None), REQUEST_ERROR, "^result must not be NULL$")
    for stale in (0xDEADBEEF, 2**63, 1 << 20):
        fails(draw(c_void_p(stale), byref(request), byref(out)), CLOSED, "^pipeline was closed, or is no pipeline")
    cpp_library.arcflow_close(c_void_p(0xDEADBEEF))
    fails(draw(flux.handle, byref(request), byref(out)), REQUEST_ERROR, "prompt")  # neither prompts nor tokens
    request.prompt_count = 1
    fails(draw(flux.handle, byref(request), byref(out)), REQUEST_ERROR, "prompt")
    request.prompts = (c_char_p * 1)(None)
    fails(draw(flux.handle, byref(request), byref(out)), REQUEST_ERROR, "prompt")
    request.prompts = (c_char_p * 1)(b"\xff\xfe")
    fails(draw(flux.handle, byref(request), byref(out)), REQUEST_ERROR, "UTF-8")
    request.prompts, request.seed_count = (c_char_p * 1)(b"x"), 1
    fails(draw(flux.handle, byref(request), byref(out)), REQUEST_ERROR, "seed")
    fails(cpp_library.arcflow_noise(1, 5, None), REQUEST_ERROR, "^noise must not be NULL$")
    assert out.value is None


def test_both_prompts_and_tokens(cpp_pipes):
    with pytest.raises(embed.ArcFlowError, match="tokens") as e:
        cpp_pipes("flux-tiny").draw(["x"], tokens=[([1], [1])])
    assert e.value.status == REQUEST_ERROR


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("flux-tiny", ([1] * 78, [1])),  # more than CLIP's 77
        ("flux-tiny", ([1], [1] * 513)),  # more than max_sequence_length
        ("flux-tiny", ([-1], [1])),
        ("qwen-tiny", [1] * 34),  # the template's beginning and nothing more
        ("qwen-tiny", [1] * 547),  # more than the template's beginning and max_sequence_length
        ("qwen-tiny", []),
        ("qwen-tiny", ([1] * 40, [1])),  # there is one text encoder
    ],
)
def test_wrong_tokens(cpp_pipes, name, tokens):
    with pytest.raises(embed.ArcFlowError) as e:
        cpp_pipes(name).draw(tokens=[tokens], height=32, width=32)
    assert e.value.status == REQUEST_ERROR, e.value
    assert "ids" in str(e.value) or "tokens" in str(e.value)


def test_ids_beyond_the_vocabulary_do_no_harm(cpp_pipes):
    """Whether refused or taken for nothing, nothing outside the embedding is read."""
    for ids in (10**6, 2**62):
        with contextlib.suppress(embed.ArcFlowError):
            cpp_pipes("flux-tiny").draw(tokens=[([ids], [ids])], height=32, width=32)


def test_versions_of_the_structs(cpp_library, cpp_pipes):
    pipe, size = cpp_pipes("flux-tiny"), ctypes.sizeof(embed.Request)

    class Newer(ctypes.Structure):
        _fields_ = (("known", embed.Request), ("extra", c_int64))

    newer = Newer()
    request = newer.known
    request.guidance_scale, request.height, request.width, request.seed_count = -1, 32, 32, 0
    request.prompts, request.prompt_count = (c_char_p * 1)(b"x"), 1
    out = c_void_p()

    def draw():
        return cpp_library.arcflow_draw(pipe.handle, byref(request), byref(out))

    request.struct_size = ctypes.sizeof(Newer)
    assert draw() == 0
    cpp_library.arcflow_result_free(out)
    newer.extra = 1
    assert draw() == REQUEST_ERROR
    assert cpp_library.arcflow_last_error().decode() == (
        f"request sets what this library, version {cpp_library.arcflow_version().decode()}, does not know; "
        "install the version that the program was compiled with"
    )
    for wrong in (0, 8, size - 16, 1 << 20):
        request.struct_size = wrong
        assert draw() == REQUEST_ERROR
        assert (
            f"request.struct_size must be the struct's size, {size} or a little more, got {wrong}; begin with its"
            in (cpp_library.arcflow_last_error().decode())
        )
    options = embed.Options(struct_size=1)
    assert cpp_library.arcflow_open(b"x", byref(options), byref(out)) == REQUEST_ERROR
    assert cpp_library.arcflow_last_error().startswith(b"options.struct_size must be the struct's size, ")


def test_the_last_error_is_of_its_thread_and_its_call(cpp_library):
    out = c_void_p()
    assert cpp_library.arcflow_open(b"nowhere", None, byref(out)) == BUNDLE_ERROR
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cpp_library.arcflow_last_error).result() == b""
    assert cpp_library.arcflow_last_error().startswith(f"{Path.cwd() / 'nowhere'} is not a directory".encode())
    assert cpp_library.arcflow_noise(1, 1, (c_float * 1)()) == 0
    assert cpp_library.arcflow_last_error() == b""


def test_options_that_are_wrong(cpp_library, cpp_bundles):
    cases = [
        ({"backend": b"tensorflow"}, ENGINE_ERROR, r"^backend must be one of openvino.*, got 'tensorflow'$"),
        ({"threads": -1}, REQUEST_ERROR, "^threads must be at least 1, got -1; leave it out to use every core$"),
        (
            {"threads": 100_000},
            REQUEST_ERROR,
            r"^threads must be at most \d+, one per core of this machine, got 100000; leave it out to use every core$",
        ),
    ]
    for options, status, message in cases:
        with pytest.raises(embed.ArcFlowError, match=message) as e:
            embed.Pipeline(cpp_library, cpp_bundles("flux-tiny"), **options)
        assert e.value.status == status
    assert "openvino" in cpp_library.arcflow_backends().decode().split(",")


@pytest.fixture
def copy(cpp_bundles, tmp_path):
    return shutil.copytree(cpp_bundles("flux-tiny"), tmp_path / "bundle")


def _truncate(root: Path) -> None:
    data = (root / "backbone.safetensors").read_bytes()
    (root / "backbone.safetensors").write_bytes(data[:-5])


def _edit(root: Path) -> None:
    data = bytearray((root / "backbone.onnx").read_bytes())
    data[-1] ^= 1
    (root / "backbone.onnx").write_bytes(data)


DAMAGES = {
    "no directory": lambda root: shutil.rmtree(root),
    "no manifest": lambda root: (root / MANIFEST).unlink(),
    "truncated weights": _truncate,
    "edited graph": _edit,
    "missing file": lambda root: (root / "conditioner.onnx").unlink(),
    "edited manifest": lambda root: (root / MANIFEST).write_text(
        (root / MANIFEST).read_text().replace('"shift": 3.2', '"shift": 1.5')
    ),
    "another version": lambda root: edit_manifest(root, version=2),
    "unknown key": lambda root: edit_manifest(root, schedule__sampler="euler"),
    "wrong dtype": lambda root: edit_manifest(root, dtype="float8"),
    "path outside": lambda root: edit_manifest(root, parts__backbone__graph="../backbone.onnx"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles_have_pythons_sentences(cpp_library, copy, damage):
    DAMAGES[damage](copy)
    with pytest.raises(ArcFlowError) as theirs:
        Bundle.open(copy)
    with pytest.raises(embed.ArcFlowError) as ours:
        embed.Pipeline(cpp_library, copy)
    assert ours.value.status == BUNDLE_ERROR
    assert str(ours.value) == str(theirs.value)


def reseal(root: Path, file: str) -> None:
    """Take a changed file into the manifest."""
    data = json.loads((root / MANIFEST).read_text())["files"]
    data[file] = {"bytes": (root / file).stat().st_size, "sha256": sha256_file(root / file)}
    edit_manifest(root, files=data)


def test_a_full_check_hashes_large_files(cpp_library, copy):
    assert embed.Pipeline(cpp_library, copy, full_check=1).draw(["x"], height=32, width=32).pixels is not None


def test_a_manifest_that_lies_about_a_dtype(cpp_library, copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    part = manifest["parts"]["vae_decoder"]
    part["outputs"][0]["dtype"] = "float32"
    edit_manifest(copy, parts=manifest["parts"])
    with pytest.raises(embed.ArcFlowError) as e:
        embed.Pipeline(cpp_library, copy).draw(["x"], height=32, width=32)
    assert e.value.status in (BUNDLE_ERROR, ENGINE_ERROR)


def test_without_tokenizers_only_ids_can_be_drawn(cpp_library, bundles, copy, cpp_pipes, cpp_bundles):
    shutil.rmtree(copy / "openvino")
    pipe = embed.Pipeline(cpp_library, copy)
    with pytest.raises(embed.ArcFlowError) as e:
        pipe.draw(["a red circle"], height=32, width=32)
    assert e.value.status == BUNDLE_ERROR
    assert str(e.value) == (
        f"{copy}: this library needs 'tokenizer' in a form of its own to read prompts; "
        f"run `arcflow build {copy} --backend openvino`, or give token ids"
    )
    ours = pipe.draw(tokens=[ids_of(copy, "a red circle")], height=32, width=32, seeds=[1])
    theirs = cpp_pipes("flux-tiny").draw(["a red circle"], height=32, width=32, seeds=[1])
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "ARCFLOW_OPENVINO_TOKENIZERS must name libopenvino_tokenizers.so, got '{}'; "),
        (lambda p: p.write_text("no library"), "OpenVINO cannot load {}: "),
    ],
)
def test_without_the_library_of_tokenizers_only_ids_can_be_drawn(
    cpp_library, copy, cpp_pipes, tmp_path, monkeypatch, make, message
):
    path = tmp_path / "libopenvino_tokenizers.so"
    make(path)
    monkeypatch.setenv("ARCFLOW_OPENVINO_TOKENIZERS", str(path))
    pipe = embed.Pipeline(cpp_library, copy)
    for _ in range(2):
        with pytest.raises(embed.ArcFlowError) as e:
            pipe.draw(["a red circle"], height=32, width=32)
        assert e.value.status == ENGINE_ERROR
        assert str(e.value).startswith("tokenizer: " + message.format(path))
        assert "; pip install openvino-tokenizers of OpenVINO's version" in str(e.value)
        assert str(e.value).endswith(", or give token ids")
    ours = pipe.draw(tokens=[ids_of(copy, "a red circle")], height=32, width=32, seeds=[1])
    theirs = cpp_pipes("flux-tiny").draw(["a red circle"], height=32, width=32, seeds=[1])
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    # What is wrong with the bundle is told at once all the same.
    record = copy / "openvino" / "tokenizers.json"
    record.write_text(record.read_text().replace('"converter": ', '"converter": 1'))
    with pytest.raises(embed.ArcFlowError, match="does not match its own digest") as e:
        embed.Pipeline(cpp_library, copy)
    assert e.value.status == BUNDLE_ERROR


def test_latents_that_are_not_finite(cpp_library, copy):
    weights = load_file(copy / "backbone.safetensors")
    [key] = [name for name in weights if name.endswith("proj_out_means.bias")]
    weights[key] = np.full_like(weights[key], np.nan)
    _rewrite(copy, "backbone.safetensors", weights)
    pipe = embed.Pipeline(cpp_library, copy)
    with pytest.raises(
        embed.ArcFlowError,
        match=r"^backbone: latents of images \[0, 1\] must be finite, got NaN or Inf; "
        r"check the checkpoint and adapter with `arcflow verify`$",
    ) as e:
        pipe.draw(["x"], height=32, width=32, num_images_per_prompt=2)
    assert e.value.status == ENGINE_ERROR


def _rewrite(root: Path, file: str, tensors: dict[str, np.ndarray]) -> None:
    """Change tensors in place, so that the byte ranges that a graph names stay."""
    path = root / file
    data = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    for name, tensor in tensors.items():
        begin, end = header[name]["data_offsets"]
        raw = np.ascontiguousarray(tensor).tobytes()
        assert len(raw) == end - begin
        data[8 + header_bytes + begin : 8 + header_bytes + end] = raw
    path.write_bytes(data)
    reseal(root, file)
