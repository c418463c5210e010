"""Convert a tokenizer folder, in any form that transformers reads, to the one tokenizer.json that the runtime reads."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from arcflow_export.errors import SourceError


def export_tokenizer(folder: Path, out: Path, what: str) -> int | None:
    """Write `out` and return the pad token's id (None if there is none).

    The written file has no padding or truncation; the runtime sets both per request.

    Raises:
        SourceError: the folder holds no tokenizer, or one that the `tokenizers` library cannot represent.
    """
    if not folder.is_dir():
        raise SourceError(f"{what}: {folder} is missing; is the checkpoint complete?")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as e:  # transformers raises many types for a bad folder
        raise SourceError(f"{what}: {folder} holds no readable tokenizer ({e})") from None
    backend.no_padding()
    backend.no_truncation()
    out.write_text(backend.to_str(pretty=False), encoding="utf-8")
    return tokenizer.pad_token_id
