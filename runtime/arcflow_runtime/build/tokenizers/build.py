"""Build a bundle's tokenizers for OpenVINO: each tokenizer.json -> a model in `openvino/`, with a record of all.

Called by `arcflow build --backend openvino`. A model is kept only if it gives the same ids as the tokenizers library
for every probe prompt. Models exist once the record does: they are first written under unique names, then the record is
renamed into place, then files that it does not name are removed.
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

#: Version of this conversion; increase it when a change makes different models from the same tokenizer.json.
CONVERTER = 1
_PARTIAL = ".partial"
# More than the disk space that a failed write by OpenVINO can leave free, which is less than a stream's buffer.
_PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class BuiltRow:
    """The result for one tokenizer: size of its files, whether existing ones were reused, and if not, what changed."""

    name: str
    bytes: int
    reused: bool
    changed: tuple[str, ...]


def build_tokenizers(bundle: Bundle) -> list[BuiltRow]:
    """Build the tokenizers that are missing or out of date. If one fails, nothing changes.

    Raises:
        EngineError: a tokenizer cannot be built or would give other ids, or the folder cannot be written.
        BundleError: a tokenizer.json cannot be read as a tokenizer.
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
    """The reasons for building a tokenizer again, one short text each; empty if there is no reason or no record."""
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
        return None, [f"the built tokenizers are damaged ({e})"]


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
        # compress_to_fp16 would round the scores of a unigram model.
        ov.save_model(model, graph, compress_to_fp16=False)
    except RuntimeError as e:  # OpenVINO raises this for all errors, a full disk included
        _check_space(partial)
        raise EngineError(
            f"{graph} cannot be written: {str(e).strip().splitlines()[-1]}; check that its folder is writable"
        ) from e
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
    """Raise the operating system's OSError if the disk has no space for a small file."""
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
    """The special-token ids that the post-processor puts before and after a text's ids."""
    encoding = tokenizer.encode("a", add_special_tokens=False)
    ids, whole = encoding.ids, tokenizer.post_process(encoding, None, True).ids
    start = next((i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids), 0)
    return whole[:start], whole[start + len(ids) :]


def _verify(path: Path, tokenizer: Tokenizer, model: Any, prefix: list[int], suffix: list[int]) -> None:
    from arcflow_runtime.build.tokenizers.probes import different_prompts, probe_prompts, shown_prompts

    def ids(prompt: str) -> list[int]:
        try:
            return model([prompt])[0].tolist()
        except RuntimeError as e:  # OpenVINO raises this for all errors; the last line of its text gives the reason
            reason = str(e).strip().splitlines()[-1]
            raise EngineError(f"{path}: OpenVINO fails on the prompt {shown_prompts([prompt])}: {reason}") from e

    prompts = probe_prompts(tokenizer)
    if different := different_prompts(tokenizer, ids, prompts):
        raise EngineError(
            f"{path}: OpenVINO would give other ids than the tokenizers library for {len(different)} of {len(prompts)} "
            f"probe prompts: {shown_prompts(different)}; pass token ids instead of prompts"
        )
    for prompt in prompts:
        text = tokenizer.encode(prompt, add_special_tokens=False).ids
        if tokenizer.encode(prompt, add_special_tokens=True).ids != [*prefix, *text, *suffix]:
            raise EngineError(
                f"{path}: its post-processor does more than put special tokens before and after the text "
                f"({shown_prompts([prompt])}); pass token ids instead of prompts"
            )


def _place(path: Path) -> ModelFile:
    """Move a finished file from the temporary folder to its final place, under a name that contains its hash."""
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
    """Remove files that the record does not name: earlier models, and unfinished files of stopped builds."""
    kept = {RECORD_FILE}
    path = folder / RECORD_FILE
    if path.exists():
        try:
            built = json.loads(path.read_bytes())["tokenizers"].values()
            kept |= {t[kind]["file"] for t in built for kind in ("graph", "weights")}
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # the files of a damaged record are unknown, so nothing is removed
    for path in folder.iterdir():
        if path.name == _PARTIAL:
            shutil.rmtree(path)
        elif path.name not in kept and path.suffix in (".xml", ".bin", _PARTIAL):
            path.unlink()
