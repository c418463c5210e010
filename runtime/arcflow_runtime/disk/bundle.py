"""Open a bundle: a directory -> its manifest, with the files checked against it. No model is loaded here.

The format is specified in `docs/bundle.md`; the rule numbers (`B1`...) below refer to it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.manifest import (
    ENGINES,
    FORMAT,
    MANIFEST,
    OPENVINO,
    PLAIN_VERSION,
    VERSIONS,
    Manifest,
    lora_keys,
    seal,
)
from arcflow_runtime.disk.parse import parse, read_json
from arcflow_runtime.disk.rules import check_values
from arcflow_runtime.disk.signatures import signatures
from arcflow_runtime.errors import BundleError

MAX_MANIFEST_BYTES = 16 << 20
#: Files up to this size are hashed each time the bundle is opened; larger ones only with `check="full"`.
FAST_HASH_BYTES = 64 << 20

Check = Literal["fast", "full"]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory `root` and its checked manifest.

    `manifest_sha256` is the SHA-256 of the `manifest.json` that was read; None if the manifest was made in memory.
    """

    root: Path
    manifest: Manifest = field(repr=False)
    manifest_sha256: str | None = field(default=None, repr=False, compare=False)

    @staticmethod
    def open(root: str | Path, check: Check = "fast", progress: Callable[[int], None] | None = None) -> Bundle:
        """Read and check the bundle in directory `root`.

        Args:
            root: the bundle's directory. It is made absolute, so a later change of the working directory is harmless.
            check: "fast" compares every size and hashes files up to 64 MiB; "full" hashes every file.
            progress: called with the number of bytes hashed since the last call.

        Raises:
            BundleError: `root` is not a bundle, has an unsupported version, is damaged, or lists a path outside itself.
        """
        root = Path(root).absolute()
        manifest, digest = read_manifest(root)
        bundle = Bundle(root, manifest, digest)
        check_values(manifest, str(root / MANIFEST))
        bundle._check_references()
        bundle._check_files(check, progress or (lambda _: None))
        return bundle

    def path(self, name: str) -> Path:
        """The absolute path of the bundle's file `name`.

        Raises:
            BundleError: the manifest does not list the file (B5).
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.root / MANIFEST}: {name!r} is used but not listed under 'files'")
        return self.root / name

    def check_unchanged(self) -> None:
        """Check that the directory still holds the bundle that was opened.

        Raises:
            BundleError: the manifest was replaced or removed since.
        """
        if self.manifest_sha256 is None:
            return
        path = self.root / MANIFEST
        try:
            unchanged = sha256_file(path) == self.manifest_sha256
        except OSError:
            unchanged = False
        if not unchanged:
            raise BundleError(f"{self.root} was replaced or removed since it was opened; load it again")

    def _check_references(self) -> None:
        m = self.manifest
        where = self.root / MANIFEST
        need = set(signatures(m.family))
        if m.modulation is not None:
            need -= {"conditioner"}
        if missing := sorted(need - m.parts.keys()):
            raise BundleError(f"{where}: a {m.family} bundle must have parts {sorted(need)}, missing {missing}")
        used = [f for p in m.parts.values() for f in (p.graph, p.weights)] + list(m.tokenizers.values())
        if m.modulation is not None:
            used.append(m.modulation.file)
        for name in used:
            self.path(name)

    def _check_files(self, check: Check, progress: Callable[[int], None]) -> None:
        for name in self.manifest.files:
            self.check_file(name, check, progress)

    def check_file(self, name: str, check: Check, progress: Callable[[int], None] | None = None) -> None:
        """Compare one file with its entry in the manifest (B4, B6); see `open` for the arguments.

        Raises:
            BundleError: the file is missing, damaged, or outside the bundle.
        """
        entry, path = self.manifest.files[name], self.root / name
        check_name(name, self.root)
        if not path.is_file():
            raise BundleError(f"{path} is missing; was the bundle moved in part? Copy the whole directory again")
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"{path} is a link that leaves the bundle; copy the file into it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{path} must have {entry.bytes} bytes, got {size}; it was cut or edited, export or copy it again"
            )
        if (check == "full" or size <= FAST_HASH_BYTES) and sha256_file(path, progress) != entry.sha256:
            raise BundleError(
                f"{path} does not match its SHA-256 in {MANIFEST}; it was edited or damaged, export or copy it again"
            )


def timestamp() -> str:
    """The current time in UTC as ISO 8601, for `Provenance.created`.

    The environment variable SOURCE_DATE_EPOCH replaces the current time, which makes exports reproducible.

    Raises:
        BundleError: SOURCE_DATE_EPOCH is not a whole number of seconds since 1970.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        when = datetime.now(timezone.utc) if epoch is None else datetime.fromtimestamp(int(epoch), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise BundleError(f"SOURCE_DATE_EPOCH must be seconds since 1970, got {epoch!r}") from None
    return when.isoformat(timespec="seconds")


def check_name(name: str, root: Path) -> None:
    """Check the name of a file in the manifest of the bundle at `root` (B4).

    Raises:
        BundleError: the name leaves the bundle, or has characters that it may not have.
    """
    parts = name.split("/")
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", name) or any(p in ("", ".", "..") for p in parts):
        raise BundleError(f"{root / MANIFEST}: file name {name!r} leaves the bundle or has characters it may not have")
    for folder, what in ((ENGINES, "engines"), (OPENVINO, "tokenizers")):
        if parts[0] == folder:
            raise BundleError(f"{root / MANIFEST}: file {name!r} must not be in {folder}/, which is for built {what}")


def read_manifest(root: Path) -> tuple[Manifest, str]:
    """Read and check the `manifest.json` of the bundle at `root`, but no other file.

    Returns:
        The manifest, and the SHA-256 of the file.

    Raises:
        BundleError: it is missing, too large, damaged or of an unsupported version.
    """
    path = root / MANIFEST
    if not root.is_dir():
        raise BundleError(f"{root} is not a directory; give the directory that `arcflow export --out` wrote")
    if not path.is_file():
        raise BundleError(f"{root} has no {MANIFEST}, so it is not a bundle; make one with `arcflow export`")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; it is not a manifest")
    try:
        text = path.read_bytes()
        data = read_json(text)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path} is not valid JSON ({e}); export the bundle again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{path}: 'format' must be {FORMAT!r}; this is not an ArcFlow bundle")
    version = data.get("version")
    if version not in VERSIONS or isinstance(version, bool):
        what = "update arcflow" if isinstance(version, int) and version > max(VERSIONS) else "export the bundle again"
        raise BundleError(f"{path}: version must be {' or '.join(map(str, VERSIONS))}, got {version!r}; {what}")
    digest = data.pop("digest", None)
    manifest: Manifest = parse(Manifest, data, str(path))
    if version == PLAIN_VERSION:
        for place, keys in lora_keys({"modulation": None} | data):
            if unknown := sorted(place.keys() & keys):
                raise BundleError(f"{path}: unknown keys {unknown} in a bundle of version {PLAIN_VERSION} (B14)")
    if digest != seal(data):
        raise BundleError(f"{path} does not match its own digest; it was edited, export the bundle again")
    return manifest, hashlib.sha256(text).hexdigest()
