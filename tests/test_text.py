import functools
import logging

import numpy as np
import pytest
from fake_bundle import GOLDEN, FakeBackend, edit_manifest, list_files, make_bundle

from arcflow_runtime import Pipeline
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.errors import BundleError
from arcflow_runtime.generate.text import EmbeddingCache, PromptTokenizer

PROMPTS = [
    "",
    " ",
    "a large red circle on a blue background",
    "Ünïcode, 日本語 and emoji 🎨!",
    "  two   spaces\nand a newline ",
    "{braces} {} {0}",
    "<|im_end|> <|endoftext|> </s>",
    "a long prompt " * 40,
]


@functools.cache
def reference_tokenizer(name):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(GOLDEN / name)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("text") / "flux", "flux"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("text") / "qwen", "qwen-image"))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("length", [3, 16, 64])
def test_flux_ids_equal_transformers(flux, prompt, length):
    ids = PromptTokenizer(flux).tokenize(prompt, length).ids
    for part, name, limit in (("text_encoder", "tokenizer", 77), ("text_encoder_2", "tokenizer_2", length)):
        tokenizer = reference_tokenizer(f"flux-tiny/base/{name}")
        theirs = tokenizer([prompt], padding="max_length", max_length=limit, truncation=True).input_ids
        assert ids[part].dtype == np.int64
        np.testing.assert_array_equal(ids[part], theirs)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("length", [3, 16, 64])
def test_qwen_ids_equal_transformers(qwen, prompt, length):
    ids = PromptTokenizer(qwen).tokenize(prompt, length).ids["text_encoder"]
    tokenizer = reference_tokenizer("qwen-tiny/base/tokenizer")
    text = "<|im_start|>user\n" + prompt + "<|im_end|>\n"
    theirs = tokenizer([text], max_length=1024 + 3, truncation=True).input_ids
    np.testing.assert_array_equal(ids, np.array(theirs)[:, : 3 + length])


def test_a_cut_prompt_says_so(flux, qwen):
    prompt = "x" * 200
    assert PromptTokenizer(flux).tokenize("short", 64).warnings == ()
    clip, t5 = PromptTokenizer(flux).tokenize(prompt, 64).warnings
    shown = "'" + "x" * 40 + "...'"
    clip_total = len(reference_tokenizer("flux-tiny/base/tokenizer")(prompt).input_ids) - 2
    t5_total = len(reference_tokenizer("flux-tiny/base/tokenizer_2")(prompt).input_ids) - 1
    assert clip == f"prompt {shown} was cut for CLIP (text_encoder): 75 of {clip_total} tokens kept"
    assert t5 == f"prompt {shown} was cut for T5 (text_encoder_2): 63 of {t5_total} tokens kept"
    (warning,) = PromptTokenizer(qwen).tokenize(prompt, 64).warnings
    text = "<|im_start|>user\n" + prompt + "<|im_end|>\n"
    total = len(reference_tokenizer("qwen-tiny/base/tokenizer")(text).input_ids) - 3
    assert warning == f"prompt {shown} was cut for the text encoder: 64 of {total} tokens kept"


def test_warnings_are_logged_and_returned(flux, caplog):
    with caplog.at_level(logging.WARNING, "arcflow"):
        output = Pipeline(flux, FakeBackend())("x" * 200, height=16, width=16)
    assert len(output.warnings) == 2
    assert [r.message for r in caplog.records] == list(output.warnings)


def test_a_tokenizers_own_padding_is_ignored(tmp_path, flux):
    from tokenizers import Tokenizer

    root = make_bundle(tmp_path / "b", "flux")
    path = root / "tokenizer_2.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=99)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))
    edit_manifest(root, files={n: vars(e) for n, e in list_files(root).items()})
    ours = PromptTokenizer(Bundle.open(root)).tokenize("a b c d", 16)
    theirs = PromptTokenizer(flux).tokenize("a b c d", 16)
    np.testing.assert_array_equal(ours.ids["text_encoder_2"], theirs.ids["text_encoder_2"])


def test_a_file_that_is_no_tokenizer(tmp_path):
    root = make_bundle(tmp_path / "b", "flux")
    (root / "tokenizer.json").write_text("{}")
    edit_manifest(root, files={n: vars(e) for n, e in list_files(root).items()})
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer \(.*\); export the bundle again$"):
        PromptTokenizer(Bundle.open(root))


def test_the_cache_is_bounded_and_drops_the_oldest():
    cache = EmbeddingCache(2)
    entry = Embeddings(np.zeros((1, 1, 1)), None)
    cache.put("a", 1, entry)
    cache.put("b", 1, entry)
    assert cache.get("a", 1) is entry
    cache.put("c", 1, entry)
    assert cache.get("b", 1) is None
    assert cache.get("a", 1) is entry
    assert cache.get("a", 2) is None
    cache.clear()
    assert cache.get("a", 1) is None
