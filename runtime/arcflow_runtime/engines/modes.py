"""The memory modes of a pipeline, which say what parts of a bundle stay loaded, and how each library uses memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from arcflow_runtime.disk.engine_record import Profile, accepts

#: "resident": all parts stay loaded. "balanced": those that every image needs. "low": none.
MemoryMode = Literal["resident", "balanced", "low"]
#: The modes, from the one that needs the most memory to the one that needs the least.
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
#: The parts that every image needs. The others are needed only for a new prompt, guidance scale or number of steps.
EVERY_IMAGE = ("backbone", "vae_decoder")


def keeps(mode: MemoryMode, part: str) -> bool:
    """True if `part` stays loaded in `mode`."""
    return mode == "resident" or (mode == "balanced" and part in EVERY_IMAGE)


@dataclass(frozen=True)
class MemoryRules:
    """How a library uses the memory of its device.

    Args:
        place: "GPU" or "CPU".
        one_workspace: all engines share one workspace for activations. Otherwise each loaded engine keeps its own.
        fused: attention is computed without a matrix of scores, and FP8 weights are multiplied as they are. Otherwise
            scores and dequantised weights are activations.
        least_item_bytes: bytes of the smallest floating-point number that it computes with.
        scratch_bytes: what its kernels need beside the results, at least, in each engine.
    """

    place: Literal["GPU", "CPU"]
    one_workspace: bool
    fused: bool
    least_item_bytes: int = 1
    scratch_bytes: int = 0


#: Every engine of TensorRT-RTX 1.7.1, however small, has 8.2 MB of scratch memory for its kernels.
TENSORRT = MemoryRules("GPU", one_workspace=True, fused=True, scratch_bytes=8 << 20)
ONNX_RUNTIME_CUDA = MemoryRules("GPU", one_workspace=False, fused=False)
#: ONNX Runtime widens float16 to float32 on a CPU. It does so with weights when a session is opened, in a copy.
ONNX_RUNTIME_CPU = MemoryRules("CPU", one_workspace=False, fused=False, least_item_bytes=4)
#: OpenVINO widens a dtype to float32 if the CPU has no instructions for it.
OPENVINO = MemoryRules("CPU", one_workspace=False, fused=False)
OPENVINO_WIDENED = MemoryRules("CPU", one_workspace=False, fused=False, least_item_bytes=4)


@dataclass(frozen=True)
class EngineBytes:
    """What a built engine takes: `weights`, and, if known, `activations` for the largest shapes of each profile."""

    weights: int
    activations: tuple[tuple[Profile, int], ...] = ()

    def activations_for(self, inputs: Mapping[str, tuple[int, ...]]) -> int | None:
        """Bytes of activations for inputs of these shapes, from the first profile that accepts them, or None."""
        return next((nbytes for profile, nbytes in self.activations if accepts(profile, inputs)), None)
