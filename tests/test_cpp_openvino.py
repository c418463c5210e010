"""OpenVINO engines and tokenizers of the C++ library, through runtime/cpp/tests/openvino_tool.cpp.

Engines are compared with ONNX Runtime. Both compute in float32 and differ in the order of sums. A sum of n products
of about equal size is off by about sqrt(n) u, u = 2^-24; with n up to 512 and some 60 operators on the longest path,
whose errors add up as sqrt(60), that is 512^(1/2) 60^(1/2) u, about 1.1e-5 of the largest value. Rounding to 8 bits
can turn it into one grey level.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import list_files, write_manifest
from small_graph import ELSEWHERE, edit_graph
from tokenizers import Tokenizer

from arcflow_runtime import Bundle, cli
from arcflow_runtime.backends import open_backend
from arcflow_runtime.build.tokenizers.probes import probe_prompts
from arcflow_runtime.disk.manifest import TensorSpec
from arcflow_runtime.disk.tokenizer_record import read_tokenizer_record
from tests.conftest import FAMILIES

BOUND = (512 * 60) ** 0.5 * 2**-24
PARTS = [("flux-tiny", p) for p in ("text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder")]
PARTS += [("qwen-tiny", p) for p in ("text_encoder", "backbone", "vae_decoder")]
SIZES = {"batch": 2, "steps": 2, "latent_height": 3, "latent_width": 2, "image_tokens": 6, "text_tokens": 5}


@pytest.fixture(scope="session")
def tool(cpp_build) -> Path:
    return cpp_build / "tests" / "openvino_tool"


def feeds(specs: tuple[TensorSpec, ...], seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made = {}
    for spec in specs:
        shape = [SIZES[d] if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype == "int64":
            made[spec.name] = random.integers(0, 30, shape)
        else:
            made[spec.name] = random.standard_normal(shape).astype(spec.dtype)
    return made


def run_part(tool: Path, bundle: Path, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    def packed(x: np.ndarray) -> bytes:
        return np.array([x.ndim, *x.shape], np.int64).tobytes() + x.tobytes()

    spec = Bundle.open(bundle).manifest.parts[part]
    given = b"".join(packed(inputs[s.name]) for s in spec.inputs)
    out = io.BytesIO(succeed(tool, "run", bundle, part, given))
    found = {}
    for s in spec.outputs:
        rank = np.frombuffer(out.read(8), np.int64)[0]
        shape = np.frombuffer(out.read(8 * rank), np.int64)
        dtype = np.dtype(s.dtype)
        found[s.name] = np.frombuffer(out.read(int(shape.prod()) * dtype.itemsize), dtype).reshape(shape)
    assert not out.read()
    return found


def succeed(tool: Path, what: str, bundle: Path, name: str, given: bytes) -> bytes:
    done = subprocess.run([tool, what, bundle, name], input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def fail(tool: Path, what: str, bundle: Path, name: str) -> str:
    done = subprocess.run([tool, what, bundle, name], input=b"a\0", capture_output=True)
    assert done.returncode == 1
    return done.stderr.decode()


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_parts_give_what_onnxruntime_gives(tool, bundles, family, part):
    bundle = Bundle.open(bundles(family))
    inputs = feeds(bundle.manifest.parts[part].inputs)
    ours = run_part(tool, bundle.root, part, inputs)
    theirs = open_backend("onnxruntime", 1).open(bundle, part).run(inputs)
    for name, expected in theirs.items():
        difference = np.abs(ours[name].astype(np.float64) - expected).max()
        assert difference <= (1 if expected.dtype == np.uint8 else BOUND * np.abs(expected).max()), name


def edited(source: Path, out: Path, change) -> Path:
    """A copy of a bundle in which `change` edited the text encoder's graph; the manifest is updated."""
    shutil.copytree(source, out)
    manifest = Bundle.open(source).manifest
    edit_graph(out / manifest.parts["text_encoder"].graph, change)
    write_manifest(out, dataclasses.replace(manifest, files=list_files(out)))
    return out


@pytest.mark.parametrize(("change", "message"), ELSEWHERE)
def test_external_data_elsewhere_is_refused(tool, bundles, tmp_path, change, message):
    bundle = edited(bundles("flux-tiny"), tmp_path / "bundle", change)
    # The messages are Python's, which quotes values with single quotes.
    message = re.sub(r"'([^' ]*)'", r'"\1"', message.format(weights="text_encoder.safetensors"))
    assert message in fail(tool, "run", bundle, "text_encoder")


def test_a_cut_graph_and_another_graph_are_refused(tool, bundles, tmp_path):
    source = bundles("flux-tiny")
    manifest = Bundle.open(source).manifest
    for name, data, message in (
        ("cut", (source / "text_encoder.onnx").read_bytes()[:-5], "is not an ONNX graph; export the bundle again"),
        ("other", (source / "conditioner.onnx").read_bytes(), "must lie in the part's weights text_encoder.safe"),
    ):
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "text_encoder.onnx").write_bytes(data)
        write_manifest(tmp_path / name, dataclasses.replace(manifest, files=list_files(tmp_path / name)))
        assert message in fail(tool, "run", tmp_path / name, "text_encoder")


def test_inputs_must_be_the_manifests(tool, bundles, tmp_path):
    def rename(model) -> None:
        for node in model.graph.node:
            node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
        model.graph.input[0].name = "tokens"

    bundle = edited(bundles("flux-tiny"), tmp_path / "bundle", rename)
    assert (
        'text_encoder: the inputs of text_encoder.onnx must be ["input_ids"], as in the manifest, got ["tokens"]; '
        "export the bundle again"
    ) in fail(tool, "run", bundle, "text_encoder")


@pytest.fixture(scope="module")
def tokenized(bundles, tmp_path_factory):
    """The golden bundles with their tokenizers built."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp("tokenized") / "bundle"
        shutil.copytree(bundles(family), made[family])
        assert cli.main(["build", str(made[family]), "--backend", "openvino"]) == 0
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_librarys(tool, tokenized, family):
    bundle = Bundle.open(tokenized[family])
    for name, file in bundle.manifest.tokenizers.items():
        tokenizer = Tokenizer.from_file(str(bundle.path(file)))
        prompts = [p for p in probe_prompts(tokenizer) if "\0" not in p]
        given = b"".join(p.encode() + b"\0" for p in prompts)
        prefix, suffix, *lines = succeed(tool, "ids", bundle.root, name, given).decode().splitlines()
        assert len(lines) == len(prompts)
        for prompt, line in zip(prompts, lines, strict=True):
            ids = [int(i) for part in (prefix, line, suffix) for i in part.split()]
            assert ids == tokenizer.encode(prompt).ids, prompt


@pytest.fixture
def copied(tokenized, tmp_path):
    shutil.copytree(tokenized["flux-tiny"], tmp_path / "bundle")
    return tmp_path / "bundle"


def test_damaged_tokenizers_are_refused(tool, copied):
    record = copied / "openvino" / "tokenizers.json"
    built = read_tokenizer_record(Bundle.open(copied)).tokenizers["tokenizer"]
    graph, weights = (copied / "openvino" / f.file for f in (built.graph, built.weights))
    text, data = record.read_text(), graph.read_bytes()
    again = "run `arcflow build BUNDLE --backend openvino` again"

    def refused(message: str) -> None:
        error = fail(tool, "ids", copied, "tokenizer")
        assert message in error and again in error

    graph.write_bytes(data[:-1] + b"x")
    refused("does not match its SHA-256; it was edited or swapped")
    graph.write_bytes(data[:-1])
    refused(f"must have {built.graph.bytes} bytes, got {built.graph.bytes - 1}; it was cut or swapped")
    graph.unlink()
    graph.symlink_to(weights)
    refused("is missing")
    graph.unlink()
    graph.write_bytes(data)
    record.write_text(text.replace('"converter": 1', '"converter": 2'))
    refused("does not match its own digest; it was edited")
    record.write_text(text.replace('"version": 1', '"version": 2'))
    refused("version must be 1, got 2")
    record.write_text(text[:-9])
    assert "tokenizers.json" in fail(tool, "ids", copied, "tokenizer")


def test_tokenizers_of_another_bundle_are_refused(tool, copied):
    kept = copied.parent / "kept"
    (copied / "openvino").rename(kept)
    manifest = Bundle.open(copied).manifest
    path = copied / manifest.tokenizers["tokenizer"]
    path.write_text(path.read_text() + "\n")
    write_manifest(copied, dataclasses.replace(manifest, files=list_files(copied)))
    kept.rename(copied / "openvino")
    error = fail(tool, "ids", copied, "tokenizer")
    assert "tokenizer was built from another tokenizer than the bundle's; run `arcflow build" in error


def test_text_that_is_not_utf8_is_refused(tool, tokenized):
    command = [tool, "ids", tokenized["flux-tiny"], "tokenizer"]
    for text in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a\xe2\x82"):
        done = subprocess.run(command, input=text, capture_output=True)
        assert (done.returncode, done.stderr) == (1, b"a prompt must be UTF-8; encode the text as UTF-8\n"), text
