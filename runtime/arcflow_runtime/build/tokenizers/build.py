"""Build a bundle's tokenizers for OpenVINO: tokenizer.json -> models in `openvino/`, with a record.

A model is put in its place only if it gives the tokenizers library's ids for every probe prompt. The record is the
commit point: models are written under names of their own first, then the record is renamed into place, then what it
does not name is removed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import is_full, locked_folder, sha256_file
from arcflow_runtime.disk.manifest import OPENVINO
from arcflow_runtime.disk.tokenizer_record import (
    RECORD_FILE,
    BuiltTokenizer,
    ModelFile,
    TokenizerRecord,
    read_tokenizer_record,
)
from arcflow_runtime.errors import BundleError, EngineError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Raised when a change here makes other models of the same tokenizer.json.
CONVERTER = 1
_PARTIAL = ".partial"
# More than a stream's buffer: what a failed write of OpenVINO's leaves free is less.
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class BuiltRow:
    """What became of one tokenizer: its files' size, whether they were there already, what changed if not."""

    name: str
    bytes: int
    reused: bool
    changed: tuple[str, ...]


def build_tokenizers(bundle: Bundle) -> list[BuiltRow]:
    """Build the tokenizers that are not there yet, all or none.

    Raises:
        EngineError: a tokenizer cannot be built, or would give other ids; or the folder cannot be written.
        BundleError: a tokenizer.json is none.
    """
    import openvino_tokenizers
    from openvino import get_version

    versions = {"openvino": get_version(), "openvino_tokenizers": openvino_tokenizers.__version__}
    busy = f"another build is writing tokenizers of {bundle.root}; wait for it"
    with locked_folder(bundle.root / OPENVINO, busy, "tokenizers") as folder:
        found, damage = _read(bundle)
        partial = folder / _PARTIAL
        rows, built = [], {}
        try:
            for name, file in bundle.manifest.tokenizers.items():
                source = bundle.manifest.files[file].sha256
                changed = _changes(found, damage, name, source, versions)
                if found is not None and not changed:
                    built[name] = found.tokenizers[name]
                else:
                    partial.mkdir(exist_ok=True)
                    built[name] = _build_one(bundle, name, partial)
                size = built[name].graph.bytes + built[name].weights.bytes
                reused = found is not None and not changed
                rows.append(BuiltRow(name, size, reused, tuple(changed)))
            if found is None or built != found.tokenizers or not all(row.reused for row in rows):
                created = datetime.now(timezone.utc).isoformat(timespec="seconds")
                _commit(folder, TokenizerRecord(built, CONVERTER, created=created, **versions))
        except OSError as e:
            if is_full(e):
                raise EngineError(f"the disk of {folder} is full; the unfinished tokenizers were removed") from e
            raise
        finally:
            _clean(folder)
    return rows


def _changes(
    found: TokenizerRecord | None, damage: list[str], name: str, source: str, versions: dict[str, str]
) -> list[str]:
    """Why a tokenizer is built again, one short text each; empty if it need not be, or never was."""
    if found is None:
        return damage
    changed = [f"{k} ({old} to {new})" for k, new in versions.items() if (old := getattr(found, k)) != new]
    if found.converter != CONVERTER:
        changed.append(f"converter ({found.converter} to {CONVERTER})")
    old = found.tokenizers.get(name)
    if old is None:
        changed.append("the tokenizer is new")
    elif old.source != source:
        changed.append(f"the tokenizer ({old.source[:12]} to {source[:12]})")
    return changed


def _read(bundle: Bundle) -> tuple[TokenizerRecord | None, list[str]]:
    try:
        return read_tokenizer_record(bundle), []
    except EngineError as e:
        return None, [f"what was built is damaged ({e})"]


def _build_one(bundle: Bundle, name: str, partial: Path) -> BuiltTokenizer:
    import openvino as ov
    from tokenizers import Tokenizer

    from arcflow_runtime.build.tokenizers.graph import build_graph

    file = bundle.manifest.tokenizers[name]
    path = bundle.path(file)
    bundle.check_file(file, "full")
    text = path.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise BundleError(f"{path} is not a tokenizer ({e}); export the bundle again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    model = build_graph(json.loads(text), str(path))
    graph, weights = partial / f"{name}.xml", partial / f"{name}.bin"
    try:
        # Scores of a unigram model stay as they are.
        ov.save_model(model, graph, compress_to_fp16=False)
    except RuntimeError as e:  # what OpenVINO raises for everything, a full disk too
        _check_space(partial)
        raise EngineError(f"{graph} cannot be written: {str(e).strip().splitlines()[-1]}") from e
    prefix, suffix = _special_ids(tokenizer)
    _verify(path, tokenizer, _compile(graph), prefix, suffix)
    return BuiltTokenizer(
        source=bundle.manifest.files[file].sha256,
        graph=_place(graph),
        weights=_place(weights),
        prefix=tuple(prefix),
        suffix=tuple(suffix),
    )


def _check_space(folder: Path) -> None:
    """Raise the operating system's error if the disk has no room for a small file."""
    probe = folder / ".space"
    try:
        with probe.open("wb") as f:
            f.write(bytes(_PROBE_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def _compile(graph: Path) -> Any:
    import openvino as ov

    return ov.Core().compile_model(str(graph), "CPU")


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text's."""
    encoding = tokenizer.encode("a", add_special_tokens=False)
    ids, whole = encoding.ids, tokenizer.post_process(encoding, None, True).ids
    start = next((i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids), 0)
    return whole[:start], whole[start + len(ids) :]


def _verify(path: Path, tokenizer: Tokenizer, model: Any, prefix: list[int], suffix: list[int]) -> None:
    from arcflow_runtime.build.tokenizers.probes import different_prompts, probe_prompts, shown_prompts

    def ids(prompt: str) -> list[int]:
        try:
            return model([prompt])[0].tolist()
        except RuntimeError as e:  # what OpenVINO raises for everything; its last line says what was wrong
            reason = str(e).strip().splitlines()[-1]
            raise EngineError(f"{path}: OpenVINO fails on the prompt {shown_prompts([prompt])}: {reason}") from e

    prompts = probe_prompts(tokenizer)
    if different := different_prompts(tokenizer, ids, prompts):
        raise EngineError(
            f"{path}: OpenVINO would give other ids than the tokenizers library for {len(different)} of {len(prompts)} "
            f"probe prompts: {shown_prompts(different)}; give token ids instead of prompts"
        )
    for prompt in prompts:
        text = tokenizer.encode(prompt, add_special_tokens=False).ids
        if tokenizer.encode(prompt, add_special_tokens=True).ids != [*prefix, *text, *suffix]:
            raise EngineError(
                f"{path}: its post-processor does more than put special tokens before and after the text "
                f"({shown_prompts([prompt])}); give token ids instead of prompts"
            )


def _place(path: Path) -> ModelFile:
    """Move a finished file out of the folder of unfinished ones, to a name by its content."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
    digest = sha256_file(path)
    final = path.parent.parent / f"{path.stem}-{digest[:16]}{path.suffix}"
    size = path.stat().st_size
    os.replace(path, final)
    return ModelFile(final.name, size, digest)


def _commit(folder: Path, record: TokenizerRecord) -> None:
    partial = folder / f"{RECORD_FILE}{_PARTIAL}"
    with partial.open("w", encoding="utf-8") as f:
        f.write(record.to_json())
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, folder / RECORD_FILE)


def _clean(folder: Path) -> None:
    """Remove what no record names: earlier models, and what was being written when a build stopped."""
    kept = {RECORD_FILE}
    path = folder / RECORD_FILE
    if path.exists():
        try:
            built = json.loads(path.read_bytes())["tokenizers"].values()
            kept |= {t[kind]["file"] for t in built for kind in ("graph", "weights")}
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # what a damaged record named is not known
    for path in folder.iterdir():
        if path.name == _PARTIAL:
            shutil.rmtree(path)
        elif path.name not in kept and path.suffix in (".xml", ".bin", _PARTIAL):
            path.unlink()
