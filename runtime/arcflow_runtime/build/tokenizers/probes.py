"""Compare a built tokenizer with the tokenizers library on probe prompts: -> the prompts with different ids."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer

#: One prompt for each kind of text that tokenizers treat differently, and texts that an operation of
#: openvino-tokenizers once got wrong.
PROBES = (
    "",
    " ",
    "a",
    "a red circle",
    "A Large RED Circle on the left, a blue square!",
    "portrait of an old sailor, oil painting, dramatic light; 35mm, f/1.4",
    "don't can't it's we'll they'd I'VE 'S 'ſ",
    "(parens) [brackets] <angle> \"quotes\" 'single' -- --- ... ?!?! #1 50% a/b a_b",
    "!!!!!!!!!!!! ......... ??? ------ ======",
    "braces {} {0} {{x}}",
    "1234567890 3.14 1,000 2024-01-31 ½ ² ① Ⅷ",
    "  two  spaces\tand\ttabs ",
    "line\nbreak\r\nmore\n\n\nlines\n",
    "\u00a0no-break\u3000wide\u2028line\u200bzero width",
    "naïve café résumé Zürich ÀÉÎÕÜ",
    "e\u0301 a\u0308 n\u0303 combining, \u1100\u1161\u11a8 jamo",
    "Straße GROẞ İstanbul ΣΑΣ Ǆ ﬁ ſ",
    "日本語のテキスト 中文提示词 한국어 프롬프트",
    "Привет мир, العربية, मानक हिन्दी, ไทย, עברית",
    "Ａ１ ｆｕｌｌ ｗｉｄｔｈ ™ ℃ ㍿",
    "a 🐱 cat 👩\u200d👩\u200d👧 family 🇩🇪 👍🏽",
    "CamelCase snake_case __init__ kebab-case",
    "▁ mark ▁x ▁▁y",
    "a\u0000b \u0001 \u007f \ufffd",
    "ends with space ",
    "word " * 300,
    "x" * 3000,
    "é" * 1000 + "!" * 1000 + " " * 1000 + "\n" * 1000 + "7" * 1000,
)
_SHOWN = 5
_SHOWN_CHARACTERS = 40


def probe_prompts(tokenizer: Tokenizer) -> list[str]:
    """`PROBES`, and prompts that contain the tokenizer's own special tokens."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return [*PROBES, *(text for t in added for text in (t, f"{t}{t}", f"a {t} b", f"a{t}b", f" {t}\n"))]


def different_prompts(tokenizer: Tokenizer, ids: Callable[[str], list[int]], prompts: list[str]) -> list[str]:
    """The prompts for which `ids` differs from the tokenizers library without special tokens."""
    return [p for p in prompts if ids(p) != tokenizer.encode(p, add_special_tokens=False).ids]


def shown_prompts(prompts: list[str]) -> str:
    """The first few prompts, shortened, for an error message."""
    texts = [repr(p if len(p) <= _SHOWN_CHARACTERS else p[:_SHOWN_CHARACTERS] + "...") for p in prompts[:_SHOWN]]
    return ", ".join(texts) + (f" and {len(prompts) - _SHOWN} more" if len(prompts) > _SHOWN else "")
