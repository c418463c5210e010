"""Load the CUDA kernels for the noise and the updates, and launch them on device addresses.

`update.cu`, `euler.cu` and `noise.cu` in `runtime/kernels/` document their arguments, and `geometry.h` how they are
launched. `kernel_code.py` finds or compiles their code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.kernel_code import cache_folder, cached_code, find_fatbin, kernels_folder

if TYPE_CHECKING:
    from cuda.core import Device, Kernel, LaunchConfig, ObjectCode

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
class EulerShape:
    """Sizes and dtypes of one launch of the kernel for a straight student's step.

    `tokens` is B*N, and `channels` C*P, a multiple of 8. `velocity` is the dtype of the backbone's output,
    `engine_input` that of the second output; both are "float32", "float16" or "bfloat16".
    """

    tokens: int
    channels: int
    velocity: DType
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

    def euler(
        self,
        stream: Any,
        shape: EulerShape,
        velocity: int,
        negative: int,
        latents: int,
        next_latents: int,
        engine_input: int,
        sigmas: int,
        scale: int,
        step: int,
    ) -> None:
        """Enqueue one step of a straight student. The arguments from `velocity` to `scale` are device addresses.

        Args:
            stream: as for `update`.
            shape: sizes and dtypes.
            velocity: [tokens, C*P], of the prompt.
            negative: [tokens, C*P], of the negative prompt; 0 for no guidance.
            latents: as for `update`, like `next_latents`, `engine_input`, `sigmas` and `step`.
            next_latents: see `latents`.
            engine_input: see `latents`.
            sigmas: see `latents`.
            scale: [1] float32, of the guidance, read at each launch; 0 for no guidance.
            step: see `latents`.

        Raises:
            EngineError: the channels are no multiple of 8, or the GPU does not take the launch.
        """
        from cuda.core import LaunchConfig

        grid, block = euler_geometry(shape)
        self._launch(
            stream,
            LaunchConfig(grid=grid, block=block),
            euler_name(shape.velocity, shape.engine_input),
            *(velocity, negative, latents, next_latents, engine_input, sigmas, scale),
            np.int64(shape.tokens),
            *(np.int32(n) for n in (step, shape.channels)),
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


def euler_name(velocity: DType, engine_input: DType) -> str:
    """The name in the source of the kernel for a straight student's step, for these dtypes."""
    return f"arcflow_euler_{velocity}_{engine_input}"


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


def euler_geometry(shape: EulerShape) -> tuple[int, int]:
    """The launch geometry of the kernel for a straight student's step: blocks, threads per block.

    Raises:
        EngineError: the channels are no multiple of 8.
    """
    if shape.channels % 8:
        raise EngineError(f"the kernel for a straight step takes a multiple of 8 channels, got {shape.channels}")
    n = launch_constants()
    lanes = n["UPDATE_LANES_32_BIT" if shape.velocity == "float32" else "UPDATE_LANES_16_BIT"]
    return -(-shape.tokens // (n["EULER_THREADS"] // lanes)), n["EULER_THREADS"]
