"""Convert a tokenizer.json of the tokenizers library to an OpenVINO model: text -> token ids.

The model is assembled from the operations of openvino-tokenizers, one or more per stage of the tokenizer, to give the
same ids as the tokenizers library. A tokenizer that these operations cannot express is rejected.

The package's own converter, `convert_tokenizer`, is not used. It needs transformers, adds padding and truncation, and
gives other ids for some prompts: it folds case where a tokenizer lowers it, so that "Straße" becomes "strasse"; before
T5, it takes only spaces for whitespace; after CLIP's special tokens, it spells out the end-of-word suffix.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from arcflow_runtime.build.tokenizers.charsmap import build_charsmap
from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    import openvino as ov

#: Outputs of an operation on texts: begins and ends of rows, begins and ends of pieces, their bytes, and, once added
#: tokens are split off, flags of special pieces.
_Nodes = list[Any]

#: Unicode's White_Space property, as in Rust's `char::is_whitespace`; `\s` of PCRE2 also matches U+180E.
_WHITESPACE = r"[\x{09}-\x{0D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}]+"
_LAST_CODE_POINT = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)
#: openvino-tokenizers reserves four output bytes per input byte for a replacement; if that is too little, it returns
#: the text unchanged.
_MAX_REPLACEMENT_BYTES = 4


def build_graph(data: dict[str, Any], where: str) -> ov.Model:
    """Build the model of a tokenizer: input `text` [1] string, output `ids` [T] int32 without special tokens.

    Args:
        data: the decoded tokenizer.json.
        where: its path, for messages.

    Raises:
        EngineError: no operation can do what the tokenizer needs; the message starts with `where`.
    """
    import openvino as ov
    from openvino_tokenizers import _get_opset_factory
    from openvino_tokenizers.tokenizer_pipeline import TokenizerPipeline

    graph = _Graph(where)
    # The shape is dynamic, because the operations would use a static number of texts as the number of pieces.
    text = ov.op.Parameter(ov.Type.string, ov.PartialShape(["?"]))
    text.output(0).tensor.add_names({"text"})
    unpacked = _get_opset_factory("opset15").create("StringTensorUnpack", text.outputs()).outputs()
    nodes: _Nodes = TokenizerPipeline.add_ragged_dimension(unpacked)
    added = data.get("added_tokens") or []
    # The tokenizers library searches for tokens with "normalized" in the normalised text, for others in the text
    # itself. The operation that splits tokens off works only once per graph, so if a tokenizer has both kinds, all of
    # them are searched for in the text itself. That differs only for tokens that become equal by normalisation.
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
    # By default, operations get names from a counter of the process. Fixed names make equal tokenizers equal files.
    for i, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{i}")
    return model


class _Graph:
    """Adds the operations of each tokenizer stage to the graph; each method maps nodes to nodes."""

    def __init__(self, where: str) -> None:
        self._where = where

    def split_added(self, nodes: _Nodes, added: list[dict[str, Any]]) -> _Nodes:
        """Split off the added tokens as pieces of their own, flagged so that later stages do not change them."""
        from openvino_tokenizers.tokenizer_pipeline import SpecialToken, SpecialTokensSplit

        for token in added:
            if token["single_word"] or not token["content"]:
                raise self._cannot(f"added token {token['content']!r} with single_word={token['single_word']}")
        split = SpecialTokensSplit([SpecialToken(t["content"], t["lstrip"], t["rstrip"]) for t in added])
        return split.get_ov_subgraph(list(nodes))

    def normalize(self, nodes: _Nodes, step: dict[str, Any]) -> _Nodes:
        """Add one normalizer; it does not change special pieces."""
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
        """Add one pre-tokenizer, which splits pieces into smaller ones."""
        kind = step["type"]
        if kind == "WhitespaceSplit":
            return self._split(nodes, _WHITESPACE, "remove", False)
        if kind == "Split" and step["behavior"] in ("Removed", "Isolated"):
            behavior = {"Removed": "remove", "Isolated": "isolate"}[step["behavior"]]
            return self._split(nodes, self._pattern(step["pattern"]), behavior, step["invert"])
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            # ByteLevel maps bytes to printable characters. Here the vocabulary is mapped back to bytes instead.
            return self._split(nodes, _BYTE_LEVEL, "isolate", False) if step.get("use_regex", True) else nodes
        if kind == "Metaspace" and step["prepend_scheme"] in ("always", "never"):
            mark = step["replacement"]
            nodes = self._replace(nodes, " ", mark)
            if step["prepend_scheme"] == "always":
                nodes = self._replace(nodes, f"^([^{mark}])", f"{mark}$1")
            # openvino-tokenizers' split with merging drops all but the last of several marks in a row.
            return self._split(nodes, f"{mark}[^{mark}]*|[^{mark}]+", "isolate", False) if step["split"] else nodes
        raise self._cannot(f"pre-tokenizer {kind} ({', '.join(f'{k}={v!r}' for k, v in step.items() if k != 'type')})")

    def tokenize(self, nodes: _Nodes, model: dict[str, Any], added: list[dict[str, Any]], byte_level: bool) -> Any:
        """Add the model, which turns all pieces into ids, in order."""
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
            # For a piece without a token, openvino-tokenizers and the tokenizers library give different ids.
            raise self._cannot("BPE without a token for every byte, within and at the end of a word,")
        # The operation appends the suffix to every piece, special ones included, so they are listed with it as well.
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
            f"{self._where}: {what} is not supported by openvino-tokenizers; pass token ids instead of prompts"
        )


def lowered_characters() -> dict[str, str]:
    """Each character that the tokenizers library's Lowercase changes -> its lowercase text."""
    from tokenizers.normalizers import Lowercase

    chars = [chr(c) for c in range(1, _LAST_CODE_POINT + 1) if c not in _SURROGATES and c != ord("\n")]
    lowered = Lowercase().normalize_str("\n".join(chars)).split("\n")
    return {char: low for char, low in zip(chars, lowered, strict=True) if char != low}


def _flat(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list, with nested sequences expanded in order."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for member in step[members] for inner in _flat(member, members)]
    return [step]


def _normalized(data: dict[str, Any], added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The added tokens with their content normalised, as they occur in normalised text."""
    from tokenizers import Tokenizer

    normalizer = Tokenizer.from_str(json.dumps(data)).normalizer
    if normalizer is None:
        return added
    return [token | {"content": normalizer.normalize_str(token["content"])} for token in added]


#: The regular expression of the tokenizers library's ByteLevel pre-tokenizer.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
