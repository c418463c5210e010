"""Read and write sealed records: a dataclass with `format` and `version` <-> JSON that ends with its own digest.

Used for the records of engines and tokenizers that were built from a bundle.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from arcflow_runtime.disk.manifest import seal
from arcflow_runtime.disk.parse import parse, read_json
from arcflow_runtime.errors import ArcFlowError, BundleError, EngineError

MAX_RECORD_BYTES = 1 << 20


def sealed_json(record: Any) -> str:
    """The record as JSON text with `format` and `version` first and its digest last (B3)."""
    data = dataclasses.asdict(record)
    data = {"format": data.pop("format"), "version": data.pop("version")} | data
    return json.dumps(data | {"digest": seal(data)}, indent=2) + "\n"


def read_sealed(
    kind: Any,
    path: Path,
    what: str,
    again: str,
    newer: str | None = None,
    error: type[ArcFlowError] = EngineError,
    limit_bytes: int = MAX_RECORD_BYTES,
    older: tuple[Any, ...] = (),
) -> Any:
    """Read and check one record, without looking at the files that it names.

    Args:
        kind: the record's dataclass; `format` and `version` must equal its defaults.
        path: the record's file.
        what: what the record is, for messages, such as "an engine's record".
        again: how to make it again, for messages.
        newer: what to do about a newer version, for messages; None means `again`.
        error: the class of the exception.
        limit_bytes: largest size of the file.
        older: dataclasses of earlier versions that are read too; the result is then one of these.

    Raises:
        ArcFlowError: of class `error`; the file is not such a record, has an unsupported version, or was edited.
    """
    try:
        if path.stat().st_size > limit_bytes:
            raise error(f"{path} is larger than {limit_bytes} bytes; it is not {what}")
        data = read_json(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise error(f"{path} is not valid JSON ({e}); {again}") from None
    if not isinstance(data, dict) or data.get("format") != kind.format:
        raise error(f"{path}: 'format' must be {kind.format!r}; this is not {what}, remove it")
    version = data.get("version")
    known = {k.version: k for k in (*older, kind)}
    if not isinstance(version, int) or isinstance(version, bool) or version not in known:
        cure = newer if newer and isinstance(version, int) and version > kind.version else again
        wanted = " or ".join(map(str, known))
        raise error(f"{path}: version must be {wanted}, got {version!r}; {cure}")
    digest = data.pop("digest", None)
    try:
        record = parse(known[version], data, str(path))
    except BundleError as e:
        raise error(f"{e}; {again}") from None
    if digest != seal(data):
        raise error(f"{path} does not match its own digest; it was edited, {again}")
    return record
