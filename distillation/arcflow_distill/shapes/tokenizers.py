"""Make the small model's tokenizers: one token per caption word for T5, byte pairs trained on the captions for CLIP."""

from __future__ import annotations

import json
from itertools import product

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from arcflow_export.families import CLIP_TOKENS
from arcflow_export.images.scenes import ATTRIBUTES, MAX_SEQUENCE_LENGTH, caption


def captions() -> list[str]:
    """Every possible caption, in a fixed order."""
    choices = [(None, *words) for words in ATTRIBUTES.values()]
    texts: dict[str, None] = {}
    for picked in product(*choices):
        words = {name: word for name, word in zip(ATTRIBUTES, picked, strict=True) if word is not None}
        texts.update(dict.fromkeys(caption(words, variant) for variant in (0, 1)))
    return list(texts)


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer with one token per word; other words become the unknown token."""
    words = sorted({word for text in captions() for word in text.replace(",", "").split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), (",", -1.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in words]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer that joins every caption word into one token; other text is split into bytes."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)
