"""A tokenizer.json of the tokenizers library -> an OpenVINO model that gives a text's ids.

openvino-tokenizers has an operation for each stage of a tokenizer. Its own converter, `convert_tokenizer`, is not used:
it needs transformers, adds padding and truncation, and chooses operations that differ in places where prompts do (it
folds case where a tokenizer lowers it, so that "Straße" becomes "strasse"; it takes only spaces for whitespace before
T5; it spells out the end of a word after CLIP's special tokens). Here its operations are put together so that they do
what the tokenizers library does, and what they cannot do is refused.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from arcflow_runtime.build.tokenizers.charsmap import build_charsmap
from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    import openvino as ov

#: Outputs of operations on texts: where rows begin and end, where their pieces do, bytes, whether a piece is special.
_Nodes = list[Any]

#: Unicode's White_Space, which Rust's `char::is_whitespace` follows; `\s` of PCRE2 has U+180E besides.
_WHITESPACE = r"[\x{09}-\x{0D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]+"
_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)
#: openvino-tokenizers gives replaced text four bytes for each of the text's before it returns the text unchanged.
_MAX_REPLACEMENT_BYTES = 4


def build_graph(data: dict[str, Any], where: str) -> ov.Model:
    """The model of a decoded tokenizer.json: input `text` [1] string, output `ids` [T] int32, no special tokens added.

    Raises:
        EngineError: the tokenizer has something that no operation does; the message starts with `where`.
    """
    import openvino as ov
    from openvino_tokenizers import _get_opset_factory
    from openvino_tokenizers.tokenizer_pipeline import TokenizerPipeline

    graph = _Graph(where)
    # Its shape is left open: the operations would take the number of texts for that of pieces.
    text = ov.op.Parameter(ov.Type.string, ov.PartialShape(["?"]))
    text.output(0).tensor.add_names({"text"})
    unpacked = _get_opset_factory("opset15").create("StringTensorUnpack", text.outputs()).outputs()
    nodes: _Nodes = TokenizerPipeline.add_ragged_dimension(unpacked)
    added = data.get("added_tokens") or []
    # Tokens that are looked for in normalised text. The operation that cuts tokens out works once in a graph, so where
    # there are both kinds all are looked for in the text as it is; that matters to nobody who spells them right.
    late = bool(added) and all(t["normalized"] for t in added)
    if late:
        added = _normalized(data, added)
    else:
        nodes = graph.split_added(nodes, added)
    for step in _flat(data.get("normalizer"), "normalizers"):
        nodes = graph.normalize(nodes, step)
    if late:
        nodes = graph.split_added(nodes, added)
    pretokenizers = _flat(data.get("pre_tokenizer"), "pretokenizers")
    for step in pretokenizers:
        nodes = graph.pretokenize(nodes, step)
    byte_level = any(step["type"] == "ByteLevel" for step in pretokenizers)
    ids = graph.tokenize(nodes, data["model"], added, byte_level)
    ids.tensor.set_names({"ids"})
    model = ov.Model([ids], [text], "tokenizer")
    # Of themselves operations are named by a counter of the process; so the same tokenizer is the same file.
    for i, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{i}")
    return model


class _Graph:
    """The stages, each from nodes to nodes."""

    def __init__(self, where: str) -> None:
        self._where = where

    def split_added(self, nodes: _Nodes, added: list[dict[str, Any]]) -> _Nodes:
        """Cut out the tokens that stand for themselves, and flag them for later stages to leave alone."""
        from openvino_tokenizers.tokenizer_pipeline import SpecialToken, SpecialTokensSplit

        for token in added:
            if token["single_word"] or not token["content"]:
                raise self._cannot(f"added token {token['content']!r} with single_word={token['single_word']}")
        split = SpecialTokensSplit([SpecialToken(t["content"], t["lstrip"], t["rstrip"]) for t in added])
        return split.get_ov_subgraph(list(nodes))

    def normalize(self, nodes: _Nodes, step: dict[str, Any]) -> _Nodes:
        """One normalizer; special pieces are left alone."""
        kind = step["type"]
        if kind in ("NFC", "NFD", "NFKC", "NFKD"):
            return self._charsmap(nodes, None, kind.lower())
        if kind == "Lowercase":
            return self._charsmap(nodes, build_charsmap(lowered_characters()), "")
        if kind == "Precompiled":
            return self._charsmap(nodes, base64.b64decode(step["precompiled_charsmap"]), "")
        if kind == "Replace":
            return self._replace(nodes, self._pattern(step["pattern"]), self._replacement(step["content"]))
        if kind == "Strip":
            sides = [s for s, on in ((f"^{_WHITESPACE}", "strip_left"), (f"{_WHITESPACE}$", "strip_right")) if step[on]]
            return self._replace(nodes, "|".join(sides), "") if sides else nodes
        raise self._cannot(f"normalizer {kind}")

    def pretokenize(self, nodes: _Nodes, step: dict[str, Any]) -> _Nodes:
        """One pre-tokenizer: pieces to smaller pieces."""
        kind = step["type"]
        if kind == "WhitespaceSplit":
            return self._split(nodes, _WHITESPACE, "remove", False)
        if kind == "Split" and step["behavior"] in ("Removed", "Isolated"):
            behavior = {"Removed": "remove", "Isolated": "isolate"}[step["behavior"]]
            return self._split(nodes, self._pattern(step["pattern"]), behavior, step["invert"])
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            # The characters that stand for bytes are undone in the vocabulary instead.
            return self._split(nodes, _BYTE_LEVEL, "isolate", False) if step.get("use_regex", True) else nodes
        if kind == "Metaspace" and step["prepend_scheme"] in ("always", "never"):
            mark = step["replacement"]
            nodes = self._replace(nodes, " ", mark)
            if step["prepend_scheme"] == "always":
                nodes = self._replace(nodes, f"^([^{mark}])", f"{mark}$1")
            # The library's merging split loses all but the last of several marks.
            return self._split(nodes, f"{mark}[^{mark}]*|[^{mark}]+", "isolate", False) if step["split"] else nodes
        raise self._cannot(f"pre-tokenizer {kind} ({', '.join(f'{k}={v!r}' for k, v in step.items() if k != 'type')})")

    def tokenize(self, nodes: _Nodes, model: dict[str, Any], added: list[dict[str, Any]], byte_level: bool) -> Any:
        """Pieces to the ids of all of them, one after the other."""
        kind = model.get("type")
        if kind == "BPE":
            step = self._bpe(model, added, byte_level)
        elif kind == "Unigram":
            step = self._unigram(model, added)
        else:
            raise self._cannot(f"model {kind}")
        from openvino_tokenizers.tokenizer_pipeline import TokenizerPipeline

        pipeline = TokenizerPipeline()
        pipeline.add_steps(step)
        pieces = nodes[:-1] if added else nodes
        return step.get_ov_subgraph(list(pieces))[2]

    def _bpe(self, model: dict[str, Any], added: list[dict[str, Any]], byte_level: bool) -> Any:
        from openvino_tokenizers.constants import MIN_CACHE_CAPACITY
        from openvino_tokenizers.tokenizer_pipeline import BPETokenizationStep
        from openvino_tokenizers.utils import apply_unicode_to_bytes

        for name in ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges"):
            if model.get(name):
                raise self._cannot(f"BPE with {name}={model[name]!r}")
        if not byte_level:
            raise self._cannot("BPE without a ByteLevel pre-tokenizer")
        suffix = model.get("end_of_word_suffix") or ""
        by_id = {i: apply_unicode_to_bytes(token) for token, i in model["vocab"].items()}
        known = set(by_id.values())
        if any(bytes([byte]) + end not in known for byte in range(256) for end in {b"", suffix.encode()}):
            # What is not found is spelled out here and unknown there, suffix and all.
            raise self._cannot("BPE without a token for every byte, within and at the end of a word,")
        # Every piece gets the suffix, special ones too; with it they must still be found whole.
        special = {t["content"].encode(): t["id"] for t in added}
        special |= {content + suffix.encode(): i for content, i in special.items()}
        by_id |= {i: content for content, i in special.items()}
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        return BPETokenizationStep(
            vocab=[by_id.get(i, b"") for i in range(max(by_id) + 1)],
            merges=[(apply_unicode_to_bytes(left), apply_unicode_to_bytes(right)) for left, right in pairs],
            unk_token=model.get("unk_token") or "",
            fuse_unk=bool(model.get("fuse_unk")),
            end_suffix=suffix,
            added_tokens=special,
            cache_capacity=MIN_CACHE_CAPACITY,
        )

    def _unigram(self, model: dict[str, Any], added: list[dict[str, Any]]) -> Any:
        from openvino_tokenizers.tokenizer_pipeline import UnigramModelStep

        if model.get("byte_fallback") or model.get("unk_id") is None:
            raise self._cannot(f"Unigram with byte_fallback={model.get('byte_fallback')}, unk_id={model.get('unk_id')}")
        return UnigramModelStep.from_hf_json({"model": dict(model), "added_tokens": added})

    def _charsmap(self, nodes: _Nodes, charsmap: bytes | None, form: str) -> _Nodes:
        from openvino_tokenizers.tokenizer_pipeline import CharsmapStep

        step = CharsmapStep(charsmap=charsmap, normalization_form=form, remove_extra_whitespaces=False)
        return nodes[:2] + step.get_ov_subgraph(nodes[2:])

    def _replace(self, nodes: _Nodes, pattern: str, replacement: str) -> _Nodes:
        from openvino_tokenizers.tokenizer_pipeline import RegexNormalizationStep

        return nodes[:2] + RegexNormalizationStep(pattern, replacement).get_ov_subgraph(nodes[2:])

    def _split(self, nodes: _Nodes, pattern: str, behavior: str, invert: bool) -> _Nodes:
        from openvino_tokenizers.tokenizer_pipeline import RegexSplitStep

        return RegexSplitStep(pattern, invert, behavior).get_ov_subgraph(list(nodes))

    def _pattern(self, pattern: dict[str, str]) -> str:
        from openvino_tokenizers.utils import quote_meta

        return pattern["Regex"] if "Regex" in pattern else quote_meta(pattern["String"])

    def _replacement(self, text: str) -> str:
        if len(text.encode()) > _MAX_REPLACEMENT_BYTES or "\\" in text:
            raise self._cannot(f"replacement by {text!r}")
        return text.replace("$", "$$")

    def _cannot(self, what: str) -> EngineError:
        return EngineError(
            f"{self._where}: {what} has no counterpart in openvino-tokenizers; give token ids instead of prompts"
        )


def lowered_characters() -> dict[str, str]:
    """Every character that the tokenizers library's Lowercase changes, with what it becomes."""
    from tokenizers.normalizers import Lowercase

    chars = [chr(c) for c in range(1, _LAST_CODE_POINT + 1) if c not in _SURROGATES and c != ord("\n")]
    lowered = Lowercase().normalize_str("\n".join(chars)).split("\n")
    return {char: low for char, low in zip(chars, lowered, strict=True) if char != low}


def _flat(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer and those in its sequences, in order."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for member in step[members] for inner in _flat(member, members)]
    return [step]


def _normalized(data: dict[str, Any], added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The added tokens as they look in normalised text."""
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_str(json.dumps(data)).normalizer
    if normalizer is None:
        return added
    return [token | {"content": normalizer.normalize_str(token["content"])} for token in added]


#: The regex of the tokenizers library's ByteLevel.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
