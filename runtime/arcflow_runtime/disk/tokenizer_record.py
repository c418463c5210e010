"""The record of the OpenVINO tokenizers built for a bundle: `TokenizerRecord` <-> `openvino/tokenizers.json`.

The format is rule O2 of docs/bundle.md. `arcflow build --backend openvino` writes it; the C++ library reads it.
"""

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
RECORD_FILE = "tokenizers.json"


@dataclass(frozen=True)
class ModelFile:
    """One file of an OpenVINO model, in the record's folder."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BuiltTokenizer:
    """One built tokenizer.

    `source` is the SHA-256 of the tokenizer.json that it was built from, `graph` and `weights` are the model's files,
    `prefix` and `suffix` the special-token ids around a text's ids.
    """

    source: str
    graph: ModelFile
    weights: ModelFile
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class TokenizerRecord:
    """The built tokenizers by their names in the manifest, the versions that built them, and when.

    `converter` is the version of our conversion; tokenizers built by another version are built again.
    """

    tokenizers: Mapping[str, BuiltTokenizer]
    converter: int
    openvino: str
    openvino_tokenizers: str
    created: str
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The record as JSON text with its digest."""
        return sealed_json(self)


def read_tokenizer_record(bundle: Bundle) -> TokenizerRecord | None:
    """Read a bundle's record and check the files that it names; None if no tokenizers were built.

    Raises:
        EngineError: the file is not a tokenizer record, has an unsupported version or was edited; or a file that it
            names is missing or damaged.
    """
    path = bundle.root / OPENVINO / RECORD_FILE
    if not path.exists():
        return None
    record: TokenizerRecord = read_sealed(TokenizerRecord, path, "a record of tokenizers", _HOW_TO_REBUILD)
    for built in record.tokenizers.values():
        for file in (built.graph, built.weights):
            _check_file(path, file)
    return record


def _check_file(record: Path, file: ModelFile) -> None:
    path = record.parent / file.file
    if Path(file.file).name != file.file or file.file in ("", ".", ".."):
        raise EngineError(f"{record}: file {file.file!r} must lie beside its record; {_HOW_TO_REBUILD}")
    if not path.is_file() or path.is_symlink():
        raise EngineError(f"{path} is missing; {_HOW_TO_REBUILD}")
    size = path.stat().st_size
    if size != file.bytes:
        raise EngineError(f"{path} must have {file.bytes} bytes, got {size}; it was cut or swapped, {_HOW_TO_REBUILD}")
    if sha256_file(path) != file.sha256:
        raise EngineError(f"{path} does not match its SHA-256; it was edited or swapped, {_HOW_TO_REBUILD}")


_HOW_TO_REBUILD = "run `arcflow build BUNDLE --backend openvino` again"
