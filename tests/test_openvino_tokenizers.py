"""`arcflow build --backend openvino`: ids are the tokenizers library's, the record, what is built again and refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_bundle import list_files, make_bundle, write_manifest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from arcflow_runtime import Bundle, cli
from arcflow_runtime.build.tokenizers import build, graph
from arcflow_runtime.build.tokenizers.probes import different_prompts, probe_prompts
from arcflow_runtime.disk.tokenizer_record import read_tokenizer_record
from arcflow_runtime.errors import EngineError

pytest.importorskip("openvino_tokenizers")

TEXTS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def clip() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CLIP), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return _trained_bpe(tokenizer, ["<|startoftext|>", "<|endoftext|>"], normalized=True, end_of_word_suffix="</w>")


def qwen() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return _trained_bpe(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalized=False)


def t5() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=2000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train(list(map(str, TEXTS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _trained_bpe(tokenizer: Tokenizer, special: list[str], normalized: bool, **options) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=[AddedToken(text, normalized=normalized, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **options,
    )
    tokenizer.train(list(map(str, TEXTS)), trainer)
    suffix = options.get("end_of_word_suffix", "")
    return _complete(tokenizer, suffix) if suffix else tokenizer


def _complete(tokenizer: Tokenizer, suffix: str) -> Tokenizer:
    """With a token for every byte that ends a word, as CLIP has; the trainer makes those that it saw."""
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    for char in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(char + suffix, len(vocab))
    return Tokenizer.from_str(json.dumps(data))


def model_of(tokenizer: Tokenizer):
    import openvino as ov

    model = ov.Core().compile_model(graph.build_graph(json.loads(tokenizer.to_str()), "tokenizer.json"), "CPU")
    return lambda prompt: model([prompt])[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("make", [clip, qwen, t5])
def test_same_ids_with_tokenizers_trained_on_real_text(make):
    tokenizer = make()
    lines = [line for path in TEXTS for line in path.read_text(encoding="utf-8").splitlines()]
    ids = model_of(tokenizer)
    different = different_prompts(tokenizer, ids, probe_prompts(tokenizer) + lines)
    if make is t5:
        # The same pieces in another order, as in a long run of dashes, have one score, and rounding decides between
        # them: the library adds in float64, OpenVINO in float32. Training is not repeatable, so lines vary.
        different = [
            p for p in different if sorted(ids(p)) != sorted(tokenizer.encode(p, add_special_tokens=False).ids)
        ]
    assert different == []


@pytest.mark.slow
def test_lowers_every_character_as_the_library_does():
    """As single words and within one: the charsmap's trie has every path that begins a character."""
    tokenizer = clip()
    chars = [chr(c) for c in range(0x20, 0x110000) if not 0xD800 <= c < 0xE000 and chr(c).lower() != chr(c)]
    assert len(chars) > 1300
    prompts = [" ".join(chars), "".join(chars), *chars[:200]]
    assert different_prompts(tokenizer, model_of(tokenizer), prompts) == []


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", "flux")


def run(bundle, *options):
    return cli.main(["build", str(bundle), "--backend", "openvino", *options])


def names(bundle):
    return sorted(path.name for path in (bundle / "openvino").iterdir())


def retrain(bundle) -> None:
    """Another tokenizer in the place of CLIP's."""
    opened = Bundle.open(bundle)
    path = bundle / opened.manifest.tokenizers["tokenizer"]
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<new>"])
    path.write_text(tokenizer.to_str())
    write_manifest(bundle, dataclasses.replace(opened.manifest, files=list_files(bundle)))


def test_builds_once_and_says_what_changed(bundle, capsys):
    assert run(bundle, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["tokenizers"]
    assert [(r["name"], r["reused"], r["changed"]) for r in rows] == [
        ("tokenizer", False, []),
        ("tokenizer_2", False, []),
    ]
    record = read_tokenizer_record(Bundle.open(bundle))
    assert record is not None
    for name, built in record.tokenizers.items():
        tokenizer = Tokenizer.from_file(str(bundle / Bundle.open(bundle).manifest.tokenizers[name]))
        ids = tokenizer.encode("a", add_special_tokens=False).ids
        assert [*built.prefix, *ids, *built.suffix] == tokenizer.encode("a").ids
    before = names(bundle)
    assert len(before) == 5
    assert run(bundle) == 0
    assert capsys.readouterr().out.count("unchanged") == 2 and names(bundle) == before

    # The manifest's list of files is of the bundle alone.
    (bundle / "openvino").rename(bundle.parent / "kept")
    retrain(bundle)
    (bundle.parent / "kept").rename(bundle / "openvino")
    assert run(bundle) == 0
    out = capsys.readouterr().out
    assert "changed: the tokenizer (" in out and out.count("unchanged") == 1
    assert len(names(bundle)) == 5 and names(bundle) != before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "message"), [("graph", "does not match its SHA-256"), ("weights", "must have")])
def test_damaged_files_are_built_again(bundle, capsys, kind, message):
    assert run(bundle) == 0
    record = read_tokenizer_record(Bundle.open(bundle))
    path = bundle / "openvino" / getattr(record.tokenizers["tokenizer"], kind).file
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x" if kind == "graph" else data[:-1])
    with pytest.raises(EngineError, match=message):
        read_tokenizer_record(Bundle.open(bundle))
    capsys.readouterr()
    assert run(bundle) == 0
    assert f"changed: the built tokenizers are damaged ({path} {message}" in capsys.readouterr().out
    assert path.read_bytes() == data


def test_an_edited_record_is_refused(bundle):
    assert run(bundle) == 0
    path = bundle / "openvino" / "tokenizers.json"
    path.write_text(path.read_text().replace('"converter": 1', '"converter": 2'))
    with pytest.raises(EngineError, match="does not match its own digest"):
        read_tokenizer_record(Bundle.open(bundle))


def test_other_ids_are_refused_and_nothing_is_left(bundle, capsys, monkeypatch):
    monkeypatch.setattr(graph, "lowered_characters", lambda: {"A": "b"})
    assert run(bundle) == 1
    err = capsys.readouterr().err
    assert "OpenVINO would give other ids than the tokenizers library for" in err
    assert "'A Large RED Circle on the left, a blue s...'" in err
    assert not (bundle / "openvino").exists()


def disk_error(number):
    """OpenVINO says the same of every failed write; what the operating system says decides."""
    import openvino

    def save_model(model, path, **options):
        raise RuntimeError("basic_ios::clear: iostream error")

    def check_space(folder):
        if number:
            raise OSError(number, os.strerror(number))

    return {(openvino, "save_model"): save_model, (build, "_check_space"): check_space}


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk of {folder} is full; the unfinished tokenizers were removed"),
        (errno.EDQUOT, "the disk of {folder} is full; the unfinished tokenizers were removed"),
        (
            0,
            "{folder}/.partial/tokenizer.xml cannot be written: basic_ios::clear: iostream error; "
            "check that its folder is writable",
        ),
    ],
)
def test_a_model_that_cannot_be_written(bundle, capsys, monkeypatch, number, message):
    for (module, name), value in disk_error(number).items():
        monkeypatch.setattr(module, name, value)
    assert run(bundle) == 1
    folder = bundle / "openvino"
    assert capsys.readouterr().err == f"arcflow build: error: {message.format(folder=folder)}\n"
    assert not folder.exists()


def test_a_disk_that_is_really_full(tmp_path, capsys):
    """Models of 61 KB, with their record, on a disk with less."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        bundle = make_bundle(disk / "bundle", "flux")
        assert run(bundle) == 1
        folder = bundle / "openvino"
        assert capsys.readouterr().err == (
            f"arcflow build: error: the disk of {folder} is full; the unfinished tokenizers were removed\n"
        )
        assert not folder.exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_byte_without_a_token_is_refused():
    data = json.loads(clip().to_str())
    del data["model"]["vocab"]["~</w>"]
    with pytest.raises(
        EngineError, match=r"^x: BPE without a token for every byte, within and at the end of a word, is"
    ):
        graph.build_graph(data, "x")


def test_what_has_no_counterpart_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(EngineError, match=r"^x: model WordLevel is not supported by openvino-tokenizers; pass token"):
        graph.build_graph(json.loads(tokenizer.to_str()), "x")


def test_needs_neither_torch_nor_transformers():
    code = (
        "import json, sys; from arcflow_runtime.build.tokenizers.graph import build_graph;"
        "from tokenizers import Tokenizer, models;"
        "build_graph(json.loads(Tokenizer(models.Unigram([('a', 0.0)], 0, False)).to_str()), 'x');"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
