"""The errors of the C API: the status, and the text, which names the field or file, what it must be and what it is."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 40}, "request.height must be a multiple of 16, got 40; the nearest is 32"),
        ({"width": 2}, "request.width must be a multiple of 16, got 2; the nearest is 16"),
        (
            {"height": 2064},
            "request.height must be between 16 and 2048 for this bundle, got 2064; export a bundle with a wider range "
            "or choose another size",
        ),
        ({"width": -16}, "request.width must be at least 1, got -16"),
        ({"num_inference_steps": 1001}, "request.num_inference_steps must be between 1 and 1000, got 1001"),
        ({"num_inference_steps": -1}, "request.num_inference_steps must be between 1 and 1000, got -1"),
        (
            {"num_images_per_prompt": 33},
            "request.prompt_count times request.num_images_per_prompt must be between 1 and 32 for this bundle, "
            "got 1 * 33 = 33; ask for fewer images at a time",
        ),
        ({"num_images_per_prompt": -1}, "request.num_images_per_prompt must be at least 1, got -1"),
        ({"max_sequence_length": 513}, "request.max_sequence_length must be between 1 and 512, got 513"),
        ({"max_sequence_length": -2}, "request.max_sequence_length must be between 1 and 512, got -2"),
        ({"guidance_scale": 66.0}, "request.guidance_scale must be between 0 and 65, got 66.0"),
        ({"seeds": [1, 2]}, "request.seed_count must be 1 or one per image, 1, got 2"),
    ],
    ids=str,
)
def test_wrong_arguments(cpp_pipes, given, message):
    with pytest.raises(embed.ArcFlowError) as e:
        cpp_pipes("flux-tiny").generate(["x"], **({"height": 32, "width": 32, "seeds": [1]} | given))
    assert (e.value.status, str(e.value)) == (REQUEST_ERROR, message)


def test_a_step_count_that_is_not_baked(cpp_pipes):
    with pytest.raises(embed.ArcFlowError) as e:
        cpp_pipes("qwen-tiny").generate(["x"], height=32, width=32, num_inference_steps=3)
    assert (e.value.status, str(e.value)) == (
        REQUEST_ERROR,
        "request.num_inference_steps must be one of those baked into this bundle, [2, 4], got 3; export with --steps 3"
        ", or with --keep-conditioner for any step count",
    )


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
    generate = cpp_library.arcflow_generate
    fails(generate(None, byref(request), byref(out)), REQUEST_ERROR, "^pipeline must not be NULL$")
    fails(generate(flux.handle, None, byref(out)), REQUEST_ERROR, "^request must not be NULL$")
    fails(generate(flux.handle, byref(request), None), REQUEST_ERROR, "^result must not be NULL$")
    for stale in (0xDEADBEEF, 2**63, 1 << 20):
        fails(
            generate(c_void_p(stale), byref(request), byref(out)), CLOSED, "^pipeline was closed, or is not a pipeline"
        )
    cpp_library.arcflow_close(c_void_p(0xDEADBEEF))
    fails(
        generate(flux.handle, byref(request), byref(out)),
        REQUEST_ERROR,
        "^request must have either prompts or tokens, got neither$",
    )
    request.prompts = (c_char_p * 1)(None)
    fails(
        generate(flux.handle, byref(request), byref(out)),
        REQUEST_ERROR,
        "^request.prompt_count must be at least 1, got 0; an empty string is allowed as a prompt$",
    )
    request.prompt_count = 1
    fails(
        generate(flux.handle, byref(request), byref(out)),
        REQUEST_ERROR,
        r"^request.prompts\[0\] must be a string, got NULL$",
    )
    request.prompts = (c_char_p * 1)(b"a\xff\xfe")
    fails(
        generate(flux.handle, byref(request), byref(out)),
        REQUEST_ERROR,
        r"^request.prompts\[0\] must be UTF-8, got an invalid byte at position 1; encode the text as UTF-8$",
    )
    request.prompts, request.seed_count = (c_char_p * 1)(b"x"), 1
    fails(
        generate(flux.handle, byref(request), byref(out)),
        REQUEST_ERROR,
        "^request.seeds must point to 1 numbers, got NULL$",
    )
    fails(cpp_library.arcflow_noise(1, 5, None), REQUEST_ERROR, "^noise must not be NULL$")
    assert out.value is None


def test_both_prompts_and_tokens(cpp_pipes):
    with pytest.raises(embed.ArcFlowError, match=r"^request must have either prompts or tokens, got both$") as e:
        cpp_pipes("flux-tiny").generate(["x"], tokens=[([1], [1])])
    assert e.value.status == REQUEST_ERROR


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("flux-tiny", ([1] * 78, [1]), "ids must have between 1 and 77 token ids, special tokens included, got 78"),
        (
            "flux-tiny",
            ([1], [1] * 513),
            "ids_2 must have between 1 and 512 token ids, special tokens included, got 513",
        ),
        ("flux-tiny", ([-1], [1]), "ids[0] must be between 0 and 2147483647, got -1"),
        # The template has 34 tokens before the prompt; 1 to 512 must follow.
        ("qwen-tiny", [1] * 34, "ids must have between 35 and 546 token ids, special tokens included, got 34"),
        ("qwen-tiny", [1] * 547, "ids must have between 35 and 546 token ids, special tokens included, got 547"),
        ("qwen-tiny", [], "ids must have between 35 and 546 token ids, special tokens included, got 0"),
        ("qwen-tiny", ([1] * 40, [1]), "ids_2 must be empty for a qwen-image bundle, got 1 ids"),
    ],
    ids=str,
)
def test_wrong_tokens(cpp_pipes, name, tokens, message):
    with pytest.raises(embed.ArcFlowError) as e:
        cpp_pipes(name).generate(tokens=[tokens], height=32, width=32)
    assert (e.value.status, str(e.value)) == (REQUEST_ERROR, f"request.tokens[0].{message}")


def test_ids_beyond_the_vocabulary(cpp_pipes):
    """The tiny encoders have a few hundred embeddings, and nothing behind them is read: every such id is the same."""
    pipe = cpp_pipes("flux-tiny")
    first, second = (
        pipe.generate(tokens=[([i], [i])], height=32, width=32, seeds=[1], skip_decode=1) for i in (10**6, 2 * 10**9)
    )
    np.testing.assert_array_equal(first.latents, second.latents)
    with pytest.raises(embed.ArcFlowError, match=r"ids\[0\] must be between 0 and 2147483647, got 46"):
        pipe.generate(tokens=[([2**62], [1])], height=32, width=32)


def test_versions_of_the_structs(cpp_library, cpp_pipes):
    pipe = cpp_pipes("flux-tiny")
    oldest = embed.Request.user.offset + embed.Request.user.size  # of the first release, without LoRAs

    class Newer(ctypes.Structure):
        _fields_ = (("known", embed.Request), ("extra", c_int64))

    newer = Newer()
    request = newer.known
    request.guidance_scale, request.height, request.width, request.seed_count = -1, 32, 32, 0
    request.prompts, request.prompt_count = (c_char_p * 1)(b"x"), 1
    out = c_void_p()

    def generate():
        return cpp_library.arcflow_generate(pipe.handle, byref(request), byref(out))

    request.struct_size = ctypes.sizeof(Newer)
    assert generate() == 0
    cpp_library.arcflow_result_free(out)
    newer.extra = 1
    assert generate() == REQUEST_ERROR
    assert cpp_library.arcflow_last_error().decode() == (
        f"request sets what this library, version {cpp_library.arcflow_version().decode()}, does not know; "
        "install the version that the program was compiled with"
    )
    request.struct_size, request.lora_count = oldest, 7
    assert generate() == 0, "what is behind the struct of an older program is not read"
    cpp_library.arcflow_result_free(out)
    for wrong in (0, 8, oldest - 8, 1 << 20):
        request.struct_size = wrong
        assert generate() == REQUEST_ERROR
        assert (
            f"request.struct_size must be the struct's size, {oldest} or a little more, got {wrong}; begin with its"
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
        ({"backend": b"tensorflow"}, ENGINE_ERROR, r'^options.backend must be one of openvino.*, got "tensorflow"$'),
        ({"threads": -1}, REQUEST_ERROR, "^options.threads must be at least 0, got -1; 0 uses every core$"),
        (
            {"threads": 100_000},
            REQUEST_ERROR,
            r"^options.threads must be at most \d+, one per core of this machine, got 100000; 0 uses every core$",
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
    "no directory": (
        lambda root: shutil.rmtree(root),
        "{root} is not a directory; give the directory that `arcflow export --out` wrote",
    ),
    "no manifest": (
        lambda root: (root / MANIFEST).unlink(),
        "{root} has no manifest.json, so it is not a bundle; make one with `arcflow export`",
    ),
    "truncated weights": (
        _truncate,
        "{root}/backbone.safetensors must have {bytes} bytes, got {cut}; it was cut or edited, export or copy it again",
    ),
    "edited graph": (
        _edit,
        "{root}/backbone.onnx does not match its SHA-256 in manifest.json; it was edited or damaged, export or copy it "
        "again",
    ),
    "missing file": (
        lambda root: (root / "conditioner.onnx").unlink(),
        "{root}/conditioner.onnx is missing; was the bundle moved in part? Copy the whole directory again",
    ),
    "edited manifest": (
        lambda root: (root / MANIFEST).write_text(
            (root / MANIFEST).read_text().replace('"shift": 3.2', '"shift": 1.5')
        ),
        "{root}/manifest.json does not match its own digest; it was edited, export the bundle again",
    ),
    "another version": (
        lambda root: edit_manifest(root, version=5),
        "{root}/manifest.json: version must be 1, 2, 3 or 4, got 5; update arcflow",
    ),
    "version 2 without slots": (
        lambda root: edit_manifest(root, version=2),
        "{root}/manifest.json: version must be 1 for these slots and formats (B14, B15), got 2; "
        "export the bundle again",
    ),
    "unknown key": (
        lambda root: edit_manifest(root, schedule__sampler="euler"),
        '{root}/manifest.json: schedule: unknown keys ["sampler"]; the known keys are ["num_inference_steps", "shift", '
        '"timestep_ratio"]; export the bundle again',
    ),
    "wrong dtype": (
        lambda root: edit_manifest(root, dtype="float8"),
        '{root}/manifest.json: dtype must be one of ["float32", "float16", "bfloat16", "int64", "uint8"], got "float8"'
        "; export the bundle again",
    ),
    "path outside": (
        lambda root: edit_manifest(root, parts__backbone__graph="../backbone.onnx"),
        '{root}/manifest.json: "../backbone.onnx" is used but not listed under "files"',
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_bundles(cpp_library, copy, damage, message):
    whole = (copy / "backbone.safetensors").stat().st_size
    damage(copy)
    with pytest.raises(ArcFlowError):
        Bundle.open(copy)  # Python refuses it too
    with pytest.raises(embed.ArcFlowError) as e:
        embed.Pipeline(cpp_library, copy)
    assert e.value.status == BUNDLE_ERROR
    assert str(e.value) == message.format(root=copy, bytes=whole, cut=whole - 5)


def reseal(root: Path, file: str) -> None:
    """Update the manifest for a changed file."""
    data = json.loads((root / MANIFEST).read_text())["files"]
    data[file] = {"bytes": (root / file).stat().st_size, "sha256": sha256_file(root / file)}
    edit_manifest(root, files=data)


def test_a_full_check_hashes_large_files(cpp_library, copy):
    assert embed.Pipeline(cpp_library, copy, full_check=1).generate(["x"], height=32, width=32).pixels is not None


def test_a_manifest_that_lies_about_a_dtype(cpp_library, copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    part = manifest["parts"]["vae_decoder"]
    part["outputs"][0]["dtype"] = "float32"
    edit_manifest(copy, parts=manifest["parts"])
    with pytest.raises(embed.ArcFlowError) as e:
        embed.Pipeline(cpp_library, copy).generate(["x"], height=32, width=32)
    assert e.value.status in (BUNDLE_ERROR, ENGINE_ERROR)


def test_without_tokenizers_only_token_ids_work(cpp_library, bundles, copy, cpp_pipes, cpp_bundles):
    shutil.rmtree(copy / "openvino")
    pipe = embed.Pipeline(cpp_library, copy)
    with pytest.raises(embed.ArcFlowError) as e:
        pipe.generate(["a red circle"], height=32, width=32)
    assert e.value.status == BUNDLE_ERROR
    assert str(e.value) == (
        f'{copy}: the bundle has no OpenVINO tokenizer for "tokenizer", which prompts need; '
        f"run `arcflow build {copy} --backend openvino`, or give token ids"
    )
    ours = pipe.generate(tokens=[ids_of(copy, "a red circle")], height=32, width=32, seeds=[1])
    theirs = cpp_pipes("flux-tiny").generate(["a red circle"], height=32, width=32, seeds=[1])
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, 'ARCFLOW_OPENVINO_TOKENIZERS must name libopenvino_tokenizers.so, got "{}"; '),
        (lambda p: p.write_text("no library"), "OpenVINO cannot load {}: "),
    ],
)
def test_without_the_library_of_tokenizers_only_token_ids_work(
    cpp_library, copy, cpp_pipes, tmp_path, monkeypatch, make, message
):
    path = tmp_path / "libopenvino_tokenizers.so"
    make(path)
    monkeypatch.setenv("ARCFLOW_OPENVINO_TOKENIZERS", str(path))
    pipe = embed.Pipeline(cpp_library, copy)
    for _ in range(2):
        with pytest.raises(embed.ArcFlowError) as e:
            pipe.generate(["a red circle"], height=32, width=32)
        assert e.value.status == ENGINE_ERROR
        assert str(e.value).startswith("tokenizer: " + message.format(path))
        assert "; pip install openvino-tokenizers of OpenVINO's version" in str(e.value)
        assert str(e.value).endswith(", or give token ids")
    ours = pipe.generate(tokens=[ids_of(copy, "a red circle")], height=32, width=32, seeds=[1])
    theirs = cpp_pipes("flux-tiny").generate(["a red circle"], height=32, width=32, seeds=[1])
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    # An error of the bundle still comes at once.
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
        pipe.generate(["x"], height=32, width=32, num_images_per_prompt=2)
    assert e.value.status == ENGINE_ERROR


def _rewrite(root: Path, file: str, tensors: dict[str, np.ndarray]) -> None:
    """Change tensors in place; graphs name byte ranges of the file, which must stay."""
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
