"""Tokenise prompts: a prompt -> token ids [1, T] int64 of each text encoder. Also a bounded cache of embeddings.

FLUX: CLIP's ids are padded to 77 and T5's to `max_sequence_length`. Qwen-Image: the prompt is put into the chat
template and not padded, so its length never depends on other prompts in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.families import TextKind, facts
from arcflow_runtime.disk.manifest import Manifest, PromptFormat
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.engines.lru import LruCache
from arcflow_runtime.errors import BundleError
from arcflow_runtime.lora.prepare import SetKey

#: Prompts whose ids are kept, so that a service that counts the tokens of a finished image's prompt need not tokenise
#: it again. A service generates fewer at a time.
_KNOWN_PROMPTS = 128
#: Number of prompts whose embeddings are cached; 512 tokens of Qwen-Image or T5 take about 8 MB.
CACHED_PROMPTS = 16
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Tokens:
    """A tokenised prompt: part name -> ids [1, T] int64, read-only, and warnings about tokens that were cut off."""

    ids: dict[str, np.ndarray]
    warnings: tuple[str, ...]


def blank_text(manifest: Manifest, tokens: int) -> Embeddings:
    """Embeddings of zeros in the shapes of a prompt with T = `tokens` text states, for warm-up."""
    shapes = {
        s.name: s.shape for p in ("backbone", "conditioner") if p in manifest.parts for s in manifest.parts[p].inputs
    }
    pooled = shapes.get("pooled_projections")
    states = np.zeros((1, tokens, int(shapes["encoder_hidden_states"][-1])), np.float32)
    return Embeddings(states, None if pooled is None else np.zeros((1, int(pooled[-1])), np.float32))


class PromptTokenizer:
    """Tokenises prompts for one bundle, and remembers the most recent; safe to call from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        kinds: dict[TextKind, Callable[[str, int], Tokens]] = {
            "clip-t5": self._tokenize_padded,
            "template": self._tokenize_template,
        }
        self._tokenize = kinds[facts(bundle.manifest.family).text]
        self._text = bundle.manifest.text
        self._tokenizers = {name: _open(bundle, name) for name in bundle.manifest.tokenizers}
        self._known: LruCache[tuple[str, int], Tokens] = LruCache(_KNOWN_PROMPTS)

    def tokenize(self, prompt: str, max_sequence_length: int) -> Tokens:
        """Tokenise one prompt.

        Args:
            prompt: any text; may be empty.
            max_sequence_length: largest number of text states; FLUX pads T5's ids to it.

        Returns:
            The ids by part name, and a warning for each encoder for which the prompt is too long.
        """
        key = prompt, max_sequence_length
        tokens = self._known.get(key)
        if tokens is None:
            tokens = self._tokenize(prompt, max_sequence_length)
            self._known.put(key, tokens)
        return tokens

    def clear_cache(self) -> None:
        """Forget the tokens of earlier prompts."""
        self._known.clear()

    def _tokenize_padded(self, prompt: str, max_sequence_length: int) -> Tokens:
        clip_tokens, clip_pad, t5_pad = _flux_text(self._text)
        clip, clip_cut = _encode(self._tokenizers["tokenizer"], prompt, clip_tokens)
        t5, t5_cut = _encode(self._tokenizers["tokenizer_2"], prompt, max_sequence_length)
        cuts = {"CLIP (text_encoder)": clip_cut, "T5 (text_encoder_2)": t5_cut}
        return Tokens(
            {
                "text_encoder": _row(clip + [clip_pad] * (clip_tokens - len(clip))),
                "text_encoder_2": _row(t5 + [t5_pad] * (max_sequence_length - len(t5))),
            },
            tuple(_cut_warning(prompt, reader, *cut) for reader, cut in cuts.items() if cut),
        )

    def _tokenize_template(self, prompt: str, max_sequence_length: int) -> Tokens:
        # replace() and not format(), because a prompt may contain braces.
        templated = (self._text.template or "{}").replace("{}", prompt)
        # diffusers encodes up to 1024 tokens and then cuts the states. The language model is causal, so cutting the
        # tokens first gives the same states.
        drop = self._text.drop_tokens
        ids, cut = _encode(self._tokenizers["tokenizer"], templated, drop + max_sequence_length)
        warnings = (_cut_warning(prompt, "the text encoder", cut[0] - drop, cut[1] - drop),) if cut else ()
        return Tokens({"text_encoder": _row(ids)}, warnings)


class EmbeddingCache:
    """A least-recently-used cache of embeddings, keyed by prompt, max_sequence_length and LoRAs; thread-safe.

    The LoRAs are those that change a text encoder: a `PreparedLoras.text_key`.
    """

    def __init__(self, size: int = CACHED_PROMPTS) -> None:
        self._cache: LruCache[tuple[str, int, SetKey], Embeddings] = LruCache(size)

    def get(self, prompt: str, max_sequence_length: int, loras: SetKey = ()) -> Embeddings | None:
        """The cached embeddings, or None."""
        return self._cache.get((prompt, max_sequence_length, loras))

    def put(self, prompt: str, max_sequence_length: int, embeddings: Embeddings, loras: SetKey = ()) -> None:
        """Cache the embeddings; if the cache is full, drop the least recently used prompt."""
        self._cache.put((prompt, max_sequence_length, loras), embeddings)

    def clear(self) -> None:
        """Drop everything."""
        self._cache.clear()


def _open(bundle: Bundle, name: str) -> Tokenizer:
    path = bundle.path(bundle.manifest.tokenizers[name])
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise BundleError(f"{path} is not a tokenizer ({e}); export the bundle again") from None
    # Padding and truncation depend on the request; the file's own settings would be applied on top.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _flux_text(text: PromptFormat) -> tuple[int, int, int]:
    values = text.clip_tokens, text.clip_pad_token_id, text.t5_pad_token_id
    assert None not in values, "Bundle.open checks this"
    return values  # type: ignore[return-value]


def _encode(tokenizer: Tokenizer, text: str, limit: int) -> tuple[list[int], tuple[int, int] | None]:
    """At most `limit` ids, special tokens included; and (kept, total) tokens of the text if it was cut, else None."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    total, kept = len(encoding.ids), limit - tokenizer.num_special_tokens_to_add(False)
    if total > kept:
        encoding.truncate(max(kept, 0))
    ids = tokenizer.post_process(encoding, None, True).ids
    return ids, ((max(kept, 0), total) if total > kept else None)


def _row(ids: list[int]) -> np.ndarray:
    row = np.array([ids], np.int64)
    row.setflags(write=False)
    return row


def _cut_warning(prompt: str, reader: str, kept: int, total: int) -> str:
    shown = prompt if len(prompt) <= _SHOWN_CHARACTERS else prompt[:_SHOWN_CHARACTERS] + "..."
    return f"prompt {shown!r} was cut for {reader}: {kept} of {total} tokens kept"
