"""Index the tensors of a safetensors file or directory by name, and read them one at a time."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from arcflow_export.checkpoint.shards import PICKLES, pick_weights
from arcflow_export.checkpoint.sources import check_present
from arcflow_export.errors import SourceError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: For torch, safetensors maps a file for writing, which Linux refuses if the file is larger than the memory.
_FRAMEWORK = "numpy"
#: `digest_of` reads at most this many blocks of this size from a file: 64 MiB.
_SAMPLES, _SAMPLE_BYTES = 4096, 16 << 10


@dataclass(frozen=True)
class TensorRef:
    """One tensor in one file. The file is mapped only while the tensor is read, so that resident memory stays small."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor as stored."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    def read(self) -> torch.Tensor:
        """The whole tensor, in its stored dtype."""
        with safe_open(self.path, framework=_FRAMEWORK) as f:
            return _torch(f.get_tensor(self.key))

    def rows(self, ranges: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Rows [start, stop) of dimension 0 for each range, in the stored dtype; opens the file once."""
        with safe_open(self.path, framework=_FRAMEWORK) as f:
            tensor = f.get_slice(self.key)
            for start, stop in ranges:
                yield _torch(tensor[start:stop])


class TensorIndex(Mapping[str, TensorRef]):
    """The tensors of one component, by name."""

    def __init__(self, refs: dict[str, TensorRef], where: Path):
        self._refs = refs
        self.where = where

    def __getitem__(self, key: str) -> TensorRef:
        try:
            return self._refs[key]
        except KeyError:
            raise SourceError(f"{self.where} has no tensor {key!r}; is the checkpoint complete?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, key: object) -> bool:
        return key in self._refs

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, sorted by name."""
        return sorted({r.path for r in self._refs.values()})

    def digest(self) -> str:
        """SHA-256 of the files, see `digest_of`."""
        return digest_of(self.files)

    @staticmethod
    def open(path: Path, what: str) -> TensorIndex:
        """Index a .safetensors file, or a directory with one such file or with shards and an index.

        Raises:
            SourceError: there is no safetensors file, the file is a pickle, a shard is missing or truncated, or a dtype
                is not supported.
        """
        files = weight_files(path, what)
        refs: dict[str, TensorRef] = {}
        for file in files:
            _check_file(file, what)
            try:
                with safe_open(file, framework=_FRAMEWORK) as f:
                    for key in f.keys():  # noqa: SIM118 - not a dict
                        s = f.get_slice(key)
                        if s.get_dtype() not in DTYPES:
                            raise SourceError(
                                f"{what}: {file}: tensor {key!r} has dtype {s.get_dtype()}; "
                                f"supported are {sorted(DTYPES)}. Use the original, unquantised checkpoint"
                            )
                        refs[key] = TensorRef(file, key, tuple(s.get_shape()), DTYPES[s.get_dtype()])
            except SafetensorError as e:
                raise SourceError(f"{what}: {file} is not a valid safetensors file ({e}); download it again") from None
        return TensorIndex(refs, path)


def _torch(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor that shares its memory; bfloat16, which torch does not know from numpy, by its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 over every file's name, size, safetensors header and a sample of its values (all of a small file).

    It takes well under a second for 24 GB. It tells two sets of weights apart, because training changes nearly every
    value. It does not detect damage to single values.
    """
    sha = hashlib.sha256()
    for path in files:
        sha.update(f"{path.name} {path.stat().st_size} ".encode())
        sha.update(_read_header(path))
        for block in _sample(path):
            sha.update(block)
    return sha.hexdigest()


def weight_files(path: Path, what: str) -> list[Path]:
    """The safetensors files of a checkpoint: `path` itself, or the one or the shards in that directory.

    Raises:
        SourceError: there is none, or it is unclear which to use.
    """
    return [path] if path.is_file() else _files(path, what)


def uncache(path: Path) -> None:
    """Drop a file's pages from the page cache: clean pages at once, dirty ones after they are written; not mapped ones.

    Without this, a file that is read or written only once pushes the user's other files out of the cache, and the
    kernel looks for new pages for every byte, which can take as long as the copying. It is only a hint to the kernel,
    and does nothing on macOS.
    """
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _files(path: Path, what: str) -> list[Path]:
    if not path.is_dir():
        raise SourceError(f"{what}: {path} is not a directory")
    names = {p.name for p in path.iterdir()}
    return [path / name for name in pick_weights(names, path.joinpath, path, what).files]


def _read_header(path: Path) -> bytes:
    with path.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        return f.read(size)


def _sample(path: Path) -> Iterator[bytes]:
    """Blocks at equal distances; together they cover all of a small file."""
    size = path.stat().st_size
    with path.open("rb") as f:
        for start in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
            f.seek(start)
            yield f.read(_SAMPLE_BYTES)


def _check_file(path: Path, what: str) -> None:
    """Report the usual faults of a file in clearer words than the safetensors parser does."""
    check_present(path, what)
    if path.suffix in PICKLES:
        raise SourceError(f"{what}: {path} is a pickle, which can run code when read; convert it to safetensors")
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(9)
    if len(head) < 8:
        raise SourceError(f"{what}: {path} has only {size} bytes; it is truncated, download it again")
    # The length of a safetensors header can begin with the same bytes; then a "{" follows.
    if head[:2] in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6))) and not head.endswith(b"{"):
        raise SourceError(f"{what}: {path} is a pickle by its content; convert it to safetensors")
    if head.startswith(b"version "):
        raise SourceError(f"{what}: {path} is a Git LFS pointer, not the weights; run `git lfs pull`")
