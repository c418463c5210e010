"""Load the CUDA kernels for the noise and the update, and launch them on device addresses.

The source is in `runtime/kernels/`, and in this package once installed. `runtime/kernels/build.py` may leave a fatbin
there; it is used if it was made from exactly this source and holds code for this GPU. Otherwise NVRTC compiles the
source, once per machine, and the result is cached. `update.cu` and `noise.cu` document their arguments, `geometry.h`
their launch geometry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    from cuda.core import Device, Kernel, LaunchConfig, ObjectCode

_log = logging.getLogger("arcflow")

_DIGEST_BYTES = 32
#: The file that includes all others.
MAIN = "noise.cu"
_INCLUDE = re.compile(r'^#include "(.*)"\n', re.MULTILINE)
_DEFINE = re.compile(r"^#define ARCFLOW_(\w+) (\d+)\b", re.MULTILINE)


@dataclass(frozen=True)
class UpdateShape:
    """Sizes and dtypes of one launch of the update kernel.

    `tokens` is B*N, `modes` K, `channels` C*P and `sub_pixels` P. `heads` is the dtype of means, logweights and
    loggammas, `engine_input` that of the second output; both are "float32", "float16" or "bfloat16".
    """

    tokens: int
    modes: int
    channels: int
    sub_pixels: int
    heads: DType
    engine_input: DType


@dataclass(frozen=True)
class NoiseShape:
    """Sizes and dtype of one launch of the noise kernel.

    Each of `images` latents has `channels` C, `height` h and `width` w, packed in patches of `patch` x `patch` pixels;
    C*h*w must be a multiple of 16. `engine_input` is the dtype of the second output: "float32", "float16" or
    "bfloat16".
    """

    images: int
    channels: int
    height: int
    width: int
    patch: int
    engine_input: DType


class CudaKernels:
    """The kernels loaded on one device, from `load_kernels`; safe to use from several threads."""

    def __init__(self, code: ObjectCode) -> None:
        self._code = code
        self._kernels: dict[str, Kernel] = {}

    def update(
        self,
        stream: Any,
        shape: UpdateShape,
        means: int,
        logweights: int,
        loggammas: int,
        latents: int,
        next_latents: int,
        engine_input: int,
        sigmas: int,
        step: int,
    ) -> None:
        """Enqueue one closed-form update. The arguments from `means` to `sigmas` are device addresses.

        Args:
            stream: a `cuda.core` Stream or GraphBuilder, or an object whose `core` is one.
            shape: sizes and dtypes.
            means: [tokens, K, C*P].
            logweights: [tokens, K, P].
            loggammas: [tokens, K-1, P].
            latents: [tokens, C*P] float32.
            next_latents: [tokens, C*P] float32; may be `latents`.
            engine_input: [tokens, C*P], receives a copy of the result in the dtype `shape.engine_input`; 0 for none.
            sigmas: [S+1] float64, read at each launch, also in a captured graph.
            step: the update goes from sigmas[step] to sigmas[step + 1].

        Raises:
            EngineError: a token's modes do not fit in shared memory, or the GPU does not take the launch.
        """
        from cuda.core import LaunchConfig

        grid, block, shared = geometry(shape)
        self._launch(
            stream,
            LaunchConfig(grid=grid, block=block, shmem_size=shared),
            kernel_name(shape.heads, shape.engine_input),
            *(means, logweights, loggammas, latents, next_latents, engine_input, sigmas),
            np.int64(shape.tokens),
            *(np.int32(n) for n in (step, shape.modes, shape.channels, shape.sub_pixels)),
        )

    def noise(self, stream: Any, shape: NoiseShape, streams: int, latents: int, engine_input: int) -> None:
        """Enqueue the noise of a batch. `streams`, `latents` and `engine_input` are device addresses.

        Args:
            stream: as for `update`.
            shape: sizes and dtype.
            streams: [images, 2] int64 from `noise.streams`, read at each launch, also in a captured graph.
            latents: [images, N, C*p*p] float32, receives the noise.
            engine_input: [images, N, C*p*p], receives a copy in the dtype `shape.engine_input`; 0 for none.

        Raises:
            EngineError: the GPU does not take the launch.
        """
        from cuda.core import LaunchConfig

        n = launch_constants()
        self._launch(
            stream,
            LaunchConfig(grid=shape.images, block=n["NOISE_THREADS"], shmem_size=n["NOISE_SHARED_BYTES"]),
            f"arcflow_noise_{shape.engine_input}",
            *(streams, latents, engine_input),
            *(np.int32(n) for n in (shape.channels, shape.height, shape.width, shape.patch)),
        )

    def kernel(self, name: str) -> Kernel:
        """The `cuda.core` Kernel named `name`."""
        if name not in self._kernels:
            self._kernels[name] = self._code.get_kernel(name)
        return self._kernels[name]

    def _launch(self, stream: Any, config: LaunchConfig, name: str, *arguments: Any) -> None:
        from cuda.core import launch

        try:
            # cuda.core's own stream: a stream of another class is deprecated, and takes twice as long.
            launch(getattr(stream, "core", stream), config, self.kernel(name), *arguments)
        except Exception as e:  # cuda.core's errors share no public base
            why = str(e).partition(":")[0]  # the name of the CUDA error, without its explanation
            raise EngineError(f"the GPU does not take {name}: {why}; load the pipeline again") from e


def load_kernels(device: Device, cache: Path | None = None) -> CudaKernels:
    """Load the kernels for a device, from a fatbin, from the cache of an earlier run, or compiled by NVRTC.

    Args:
        device: the current `cuda.core` Device.
        cache: folder of compiled kernels; None for the user's cache folder.

    Raises:
        EngineError: there is neither a fatbin nor NVRTC, or NVRTC fails.
    """
    from cuda.core import ObjectCode

    arch = device.arch
    if (fatbin := find_fatbin(arch)) is not None:
        return CudaKernels(ObjectCode.from_fatbin(fatbin, name="arcflow"))
    kind, code = cached_code(arch, cache or cache_folder())
    make = ObjectCode.from_cubin if kind == "cubin" else ObjectCode.from_ptx
    return CudaKernels(make(code, name="arcflow"))


def kernel_name(heads: DType, engine_input: DType) -> str:
    """The name in the source of the update kernel for heads and engine inputs of these dtypes."""
    return f"arcflow_update_{heads}_{engine_input}"


@cache
def launch_constants() -> dict[str, int]:
    """The integers of `geometry.h` by name, without the prefix ARCFLOW_.

    Raises:
        EngineError: the kernels' source was left out of the installation.
    """
    text = (kernels_folder() / "geometry.h").read_text(encoding="utf-8")
    return {name: int(value) for name, value in _DEFINE.findall(text)}


@lru_cache(maxsize=64)
def geometry(shape: UpdateShape) -> tuple[int, int, int]:
    """The launch geometry of the update kernel: blocks, threads per block, bytes of dynamic shared memory.

    Raises:
        EngineError: a token's modes do not fit in shared memory.
    """
    n = launch_constants()
    lanes = n["UPDATE_LANES_32_BIT" if shape.heads == "float32" else "UPDATE_LANES_16_BIT"]
    token_bytes = (2 * shape.modes + 1) * shape.sub_pixels * 4
    threads = n["UPDATE_THREADS"]
    while threads >= n["UPDATE_MIN_THREADS"]:
        tokens = threads // lanes
        shared = n["UPDATE_BLOCK_BYTES"] + tokens * token_bytes
        if shared <= n["MAX_SHARED_BYTES"]:
            return -(-shape.tokens // tokens), threads, shared
        threads //= 2
    most = (n["MAX_SHARED_BYTES"] - n["UPDATE_BLOCK_BYTES"]) * lanes // n["UPDATE_MIN_THREADS"]
    raise EngineError(
        f"the update kernel takes at most {most} bytes per token for its modes, got {token_bytes} for {shape.modes} "
        f"modes of {shape.sub_pixels} sub-pixels"
    )


def kernels_folder() -> Path:
    """The folder of the kernels' source: beside this package in a checkout, inside it when installed.

    Raises:
        EngineError: the source is missing from the installation.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "update.cu").is_file():
            return folder
    raise EngineError(f"{package / 'kernels'} with the kernels' source is missing; install arcflow again")


def source() -> str:
    """The kernels as one text for NVRTC: each file that `MAIN` includes, once, before the file that includes it."""
    folder, seen = kernels_folder(), set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8")
        return "".join(map(expand, _INCLUDE.findall(text))) + _INCLUDE.sub("", text)

    return expand(MAIN)


def find_fatbin(arch: str) -> bytes | None:
    """The fatbin's bytes if it was made from this source and holds code for `arch`, such as "89"; else None."""
    folder = kernels_folder()
    try:
        about = json.loads((folder / "arcflow.fatbin.json").read_bytes())
        fatbin = (folder / "arcflow.fatbin").read_bytes()
    except (OSError, ValueError):
        return None
    made = (about.get("source_sha256"), about.get("sha256")) if isinstance(about, dict) else None
    if made != (hashlib.sha256(source().encode()).hexdigest(), hashlib.sha256(fatbin).hexdigest()):
        _log.warning("%s was made from another source; make it again with build.py", folder / "arcflow.fatbin")
        return None
    return fatbin if arch in about["architectures"] else None


def compile_code(arch: str) -> tuple[str, bytes]:
    """Compile the kernels with NVRTC, which needs no driver.

    Args:
        arch: compute capability of the GPU, such as "89".

    Returns:
        ("cubin", machine code), or ("ptx", PTX for the driver to compile) if the GPU is newer than NVRTC.

    Raises:
        EngineError: NVRTC is not installed or fails, or the GPU is too old for it.
    """
    from cuda.core import Program, ProgramOptions

    known = [n for n in nvrtc_architectures() if n <= int(arch)]
    if not known:
        raise EngineError(f"NVRTC has no architecture up to compute capability {arch}; use a GPU of 7.5 or newer")
    kind, prefix = ("cubin", "sm") if known[-1] == int(arch) else ("ptx", "compute")
    options = ProgramOptions(name="arcflow.cu", arch=f"{prefix}_{known[-1]}", std="c++17")
    try:
        program = Program(source(), "c++", options)
        code = program.compile(kind).code
    except Exception as e:  # cuda.core's errors share no public base
        raise EngineError(f"NVRTC cannot compile the kernels for {prefix}_{known[-1]}: {e}") from e
    return kind, bytes(code)


def nvrtc_architectures() -> list[int]:
    """The compute capabilities that NVRTC compiles for, in ascending order.

    Raises:
        EngineError: NVRTC is not installed.
    """
    from cuda.bindings import nvrtc

    try:
        error, archs = nvrtc.nvrtcGetSupportedArchs()
    except Exception as e:  # the loader's errors differ between versions
        raise EngineError(
            "NVRTC, which compiles the CUDA kernels, cannot be loaded; run: pip install nvidia-cuda-nvrtc "
            f"({str(e).partition(chr(10))[0]})"
        ) from e
    if error:
        raise EngineError(f"NVRTC cannot list its architectures ({error}); install nvidia-cuda-nvrtc again")
    return sorted(int(n) for n in archs)


def cached_code(arch: str, folder: Path) -> tuple[str, bytes]:
    """The result of `compile_code`, cached in `folder`. A damaged or read-only cache costs only time.

    The key is a hash of the source, NVRTC's version and `arch`. A file starts with the SHA-256 of the code after it.
    """
    from cuda.bindings import nvrtc

    nvrtc_architectures()  # raises an error that says what to do if NVRTC is missing
    version = ".".join(str(n) for n in nvrtc.nvrtcVersion()[1:])
    key = hashlib.sha256(f"{version}\n{arch}\n{source()}".encode()).hexdigest()[:32]
    for kind in ("cubin", "ptx"):
        with suppress(OSError):
            data = (folder / f"kernels-{key}.{kind}").read_bytes()
            digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                return kind, code
    kind, code = compile_code(arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="kernels-", suffix=".partial", delete=False) as f:
            f.write(hashlib.sha256(code).digest() + code)
        os.replace(f.name, folder / f"kernels-{key}.{kind}")
    except OSError as e:
        _log.warning("the compiled kernels cannot be kept in %s: %s", folder, e.strerror)
    return kind, code


def cache_folder() -> Path:
    """The user's cache folder for compiled kernels; the environment variable `ARCFLOW_CACHE` names another."""
    if named := os.environ.get("ARCFLOW_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arcflow"
