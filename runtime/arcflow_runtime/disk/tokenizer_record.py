"""The record of a bundle's built tokenizers, `openvino/tokenizers.json`: `Record` <-> JSON (O2 in docs/bundle.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.manifest import OPENVINO
from arcflow_runtime.disk.sealed import read_sealed, sealed_json
from arcflow_runtime.errors import EngineError

FORMAT = "arcflow-openvino"
VERSION = 1
RECORD = "tokenizers.json"


@dataclass(frozen=True)
class ModelFile:
    """One file of a model, beside the record."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BuiltTokenizer:
    """One tokenizer: SHA-256 of its tokenizer.json, its model's two files, the ids around the ids of a text."""

    source: str
    graph: ModelFile
    weights: ModelFile
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """What was built, by the manifest's names, with what, and when.

    `converter` counts the ways of building: models of another one are built again.
    """

    tokenizers: Mapping[str, BuiltTokenizer]
    converter: int
    openvino: str
    openvino_tokenizers: str
    created: str
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The record as JSON text, sealed with its digest."""
        return sealed_json(self)


def read_record(bundle: Bundle) -> Record | None:
    """The bundle's record, checked with the files that it names; None where nothing was built.

    Raises:
        EngineError: the record is none, of another version or edited, or one of its files is.
    """
    path = bundle.root / OPENVINO / RECORD
    if not path.exists():
        return None
    record: Record = read_sealed(Record, path, "a record of tokenizers", _AGAIN)
    for built in record.tokenizers.values():
        for file in (built.graph, built.weights):
            _check_file(path, file)
    return record


def _check_file(record: Path, file: ModelFile) -> None:
    path = record.parent / file.file
    if Path(file.file).name != file.file or file.file in ("", ".", ".."):
        raise EngineError(f"{record}: file {file.file!r} must lie beside its record; {_AGAIN}")
    if not path.is_file() or path.is_symlink():
        raise EngineError(f"{path} is missing; {_AGAIN}")
    size = path.stat().st_size
    if size != file.bytes:
        raise EngineError(f"{path} must have {file.bytes} bytes, got {size}; it was cut or swapped, {_AGAIN}")
    if sha256_file(path) != file.sha256:
        raise EngineError(f"{path} does not match its SHA-256; it was edited or swapped, {_AGAIN}")


_AGAIN = "run `arcflow build BUNDLE --backend openvino` again"
