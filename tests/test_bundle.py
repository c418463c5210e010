import json
import re

import pytest
from fake_bundle import edit_manifest, make_bundle

from arcflow_runtime.disk.bundle import FAST_HASH_BYTES, Bundle, timestamp
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.manifest import MANIFEST
from arcflow_runtime.errors import BundleError


@pytest.fixture
def root(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def qwen(tmp_path):
    return make_bundle(tmp_path / "qwen", "qwen-image", baked=(2,))


def fails(root, message, check="fast"):
    """`message` is the whole text, with {m} for the manifest and {r} for the directory."""
    expected = message.replace("{m}", str(root / MANIFEST)).replace("{r}", str(root))
    with pytest.raises(BundleError) as e:
        Bundle.open(root, check)
    assert str(e.value) == expected


def test_opens_and_round_trips(root, qwen):
    for r in (root, qwen):
        manifest = Bundle.open(r, "full").manifest
        assert manifest.to_json() == (r / MANIFEST).read_text()
    assert Bundle.open(str(root)).path("backbone.onnx") == root / "backbone.onnx"


def test_moves_as_a_whole(root, tmp_path):
    Bundle.open(root.rename(tmp_path / "elsewhere"), "full")


def test_no_directory(tmp_path):
    fails(tmp_path / "none", "{r} is not a directory; give the directory that `arcflow export --out` wrote")


def test_no_manifest(root):
    (root / MANIFEST).unlink()
    fails(root, "{r} has no manifest.json, so it is not a bundle; make one with `arcflow export`")


def test_not_json(root):
    (root / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=r"is not valid JSON \(.*\); export the bundle again$"):
        Bundle.open(root)


def test_a_key_twice(root):
    text = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text(text.replace("{", '{"version": 1, ', 1))
    with pytest.raises(BundleError, match=r"is not valid JSON \(an object has the key 'version' twice\); export the"):
        Bundle.open(root)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}'])
def test_another_format(root, text):
    (root / MANIFEST).write_text(text)
    fails(root, "{m}: 'format' must be 'arcflow-bundle'; this is not an ArcFlow bundle")


@pytest.mark.parametrize(
    ("version", "advice"),
    [(5, "update arcflow"), (0, "export the bundle again"), ("1", "export the bundle again")],
)
def test_another_version(root, version, advice):
    edit_manifest(root, version=version)
    fails(root, f"{{m}}: version must be 1, 2, 3 or 4, got {version!r}; {advice}")


def test_an_edited_manifest(root):
    text = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text(text.replace('"shift": 3.2', '"shift": 1.5'))
    fails(root, "{m} does not match its own digest; it was edited, export the bundle again")


def test_unknown_and_missing_keys(root):
    edit_manifest(root, schedule__sampler="euler")
    fails(
        root,
        "{m}: schedule: unknown keys ['sampler']; known are ['dynamic_shift', 'num_inference_steps', 'shift', "
        "'sigmas', 'terminal', 'timestep_ratio']",
    )
    edit_manifest(root, schedule__sampler=..., schedule__shift=...)
    fails(root, "{m}: schedule: missing keys ['shift']")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("family", "sdxl", "family must be one of ['flux', 'qwen-image'], got 'sdxl'"),
        ("guidance", 1, "guidance must be of type bool, got 1"),
        ("opset", True, "opset must be of type int, got True"),
        ("opset", -1, "opset must be of type int, got -1"),
        ("schedule__shift", "3.2", "schedule: shift must be of type float, got '3.2'"),
        ("rotary__axes_dims", 8, "rotary: axes_dims must be a list, got 8"),
        ("parts", [], "parts must be an object, got []"),
        ("schedule", None, "schedule must be an object, got None"),
        ("modulation", 3, "modulation must be an object, got 3"),
    ],
)
def test_wrong_types(root, key, value, message):
    edit_manifest(root, **{key: value})
    fails(root, "{m}: " + message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "uint8", "dtype must be one of ['float32', 'float16', 'bfloat16'], got 'uint8'"),
        ("schedule__shift", 0, "schedule: shift must be positive, got 0.0"),
        ("schedule__shift", float("nan"), "schedule: shift must be positive, got nan"),
        ("schedule__timestep_ratio", 0, "schedule: timestep_ratio must be above 0 and at most 1, got 0.0"),
        ("latents__num_gaussians", 0, "latents: num_gaussians must be at least 1, got 0"),
        (
            "latents__logweights_channels",
            3,
            "latents: logweights_channels must be patch_size squared, 4, got 3",
        ),
        ("rotary__axes_dims", [8, 12], "rotary: axes_dims must be three even sizes, got [8, 12]"),
        ("ranges__batch__min", 9, "ranges: batch must be min and max with 1 <= min <= max, got (9, 4)"),
        ("ranges__width_px__max", 100, "ranges: width_px must be multiples of 16, got (16, 100)"),
        ("text__t5_pad_token_id", None, "text: t5_pad_token_id must be given for a flux bundle, got None"),
        (
            "tokenizers",
            {"tokenizer": "tokenizer.json"},
            "tokenizers must be given for ['tokenizer', 'tokenizer_2'], got ['tokenizer']",
        ),
    ],
)
def test_wrong_values(root, key, value, message):
    edit_manifest(root, **{key: value})
    fails(root, f"{{m}}: {message}; export the bundle again")


def test_qwen_values(qwen):
    edit_manifest(qwen, text__template="no place")
    fails(
        qwen,
        "{m}: text: template must be a text with one {} for the prompt, got 'no place'; export the bundle again",
    )
    edit_manifest(qwen, text__template="{}", schedule__num_inference_steps=4)
    fails(qwen, "{m}: schedule: num_inference_steps must be one of [2], got 4; export the bundle again")


def test_missing_part(root):
    edit_manifest(root, parts__conditioner=...)
    needed = ["backbone", "conditioner", "text_encoder", "text_encoder_2", "vae_decoder"]
    fails(root, f"{{m}}: a flux bundle must have parts {needed}, missing ['conditioner']")


def test_a_file_that_is_used_must_be_listed(root):
    edit_manifest(root, parts__backbone__graph="other.onnx")
    fails(root, "{m}: 'other.onnx' is used but not listed under 'files'")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "./x", "a//b", "a b", "a\\b"])
def test_names_that_leave_the_bundle(root, name):
    files = json.loads((root / MANIFEST).read_text())["files"]
    edit_manifest(root, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})
    fails(root, f"{{m}}: file name {name!r} leaves the bundle or has characters it may not have")


def test_missing_file(root):
    (root / "backbone.onnx").unlink()
    fails(root, "{r}/backbone.onnx is missing; was the bundle moved in part? Copy the whole directory again")


def test_link_that_leaves(root, tmp_path):
    path = root / "backbone.onnx"
    (tmp_path / "outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "outside")
    fails(root, "{r}/backbone.onnx is a link that leaves the bundle; copy the file into it")


def test_wrong_size(root):
    path = root / "backbone.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    fails(
        root,
        "{r}/backbone.onnx must have 17 bytes, got 16; it was cut or edited, export or copy it again",
    )


def test_edited_file(root):
    path = root / "backbone.onnx"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    fails(
        root,
        "{r}/backbone.onnx does not match its SHA-256 in manifest.json; it was edited or damaged, "
        "export or copy it again",
    )


def test_large_files_are_hashed_by_full_only(root):
    path = root / "backbone.safetensors"
    with path.open("r+b") as f:
        f.truncate(FAST_HASH_BYTES + 1)
    files = json.loads((root / MANIFEST).read_text())["files"]
    files[path.name] = {"bytes": FAST_HASH_BYTES + 1, "sha256": "0" * 64}
    edit_manifest(root, files=files)
    Bundle.open(root)
    with pytest.raises(BundleError, match=re.escape(f"{path} does not match its SHA-256")):
        Bundle.open(root, "full")


def test_progress_counts_the_bytes_hashed(root):
    seen = []
    bundle = Bundle.open(root, "full", seen.append)
    assert sum(seen) == sum(e.bytes for e in bundle.manifest.files.values())
    assert sha256_file(root / "backbone.onnx") == bundle.manifest.files["backbone.onnx"].sha256


def test_a_relative_path_outlives_a_change_of_directory(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root.parent)
    bundle = Bundle.open(root.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert bundle.root == root
    bundle.check_file("backbone.onnx", "full")
    bundle.check_unchanged()


def test_a_bundle_that_was_replaced(root):
    bundle = Bundle.open(root)
    bundle.check_unchanged()
    message = f"^{re.escape(str(root))} was replaced or removed since it was opened; load it again$"
    edit_manifest(root, provenance__created="2026-01-02T00:00:00Z")
    with pytest.raises(BundleError, match=message):
        bundle.check_unchanged()
    Bundle.open(root).check_unchanged()
    (root / MANIFEST).unlink()
    with pytest.raises(BundleError, match=message):
        bundle.check_unchanged()


def test_source_date_epoch_is_when_a_bundle_was_made(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert timestamp() == "1970-01-02T00:00:00+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BundleError, match=r"^SOURCE_DATE_EPOCH must be seconds since 1970, got 'yesterday'$"):
        timestamp()
