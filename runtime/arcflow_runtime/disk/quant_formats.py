"""What readers and builders know of each number format of quantised linears (B12): the one table of formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from arcflow_runtime.disk.manifest import Manifest, Part, QuantFormat
from arcflow_runtime.errors import EngineError


@dataclass(frozen=True)
class FormatFacts:
    """One format.

    Args:
        option: its name on the command line, in `--format` and `--precision`.
        title: its name in messages.
        weight_bits: stored bits of one weight.
        calibrated: True if its input scales come from `arcflow calibrate`.
        first_sm: the first compute capability that TensorRT and TensorRT-RTX build it for; None if they do not.
        on_cpu: the CPU backends that compute it as B12 says.
        opset: the first ONNX opset with its operators and types.
    """

    option: Literal["fp8", "int8", "nvfp4"]
    title: str
    weight_bits: int
    calibrated: bool
    first_sm: int | None
    on_cpu: tuple[str, ...]
    opset: int = 20


FORMATS: Mapping[QuantFormat, FormatFacts] = {
    # OpenVINO rounds to E4M3 through float16, so not always to the nearest value.
    "fp8_e4m3": FormatFacts("fp8", "FP8", 8, True, 89, ("onnxruntime",)),
    "int8": FormatFacts("int8", "int8", 8, False, None, ("onnxruntime", "openvino")),
    # A byte of scale for every 16 weights: 4.5 bits a weight in all.
    "nvfp4": FormatFacts("nvfp4", "NVFP4", 4, True, 100, (), 23),
}
#: Name on the command line -> format.
BY_OPTION: Mapping[str, QuantFormat] = {facts.option: name for name, facts in FORMATS.items()}


def formats_of(part: Part) -> tuple[QuantFormat, ...]:
    """The formats of a part's quantised linears, in the table's order; empty if none is quantised."""
    q = part.quantization
    if q is None:
        return ()
    used = {q.format_of(layer) for layer in q.layers}
    return tuple(name for name in FORMATS if name in used)


def check_runs(manifest: Manifest, backend: str, why: str) -> None:
    """Check that a backend that is not TensorRT computes every quantised linear as B12 says.

    Args:
        manifest: the bundle's.
        backend: a name of `FormatFacts.on_cpu`.
        why: why the backend does not compute it, and what to do; ends the message "NAME is quantised to FORMAT, ...".

    Raises:
        EngineError: a part has a linear in a format that the backend does not compute; the message names the part.
    """
    wrong = [(name, FORMATS[f]) for name, found in formats_in(manifest).items() for f in found]
    wrong = [(name, facts) for name, facts in wrong if backend not in facts.on_cpu]
    for name, facts in wrong:
        if not facts.on_cpu:
            raise EngineError(
                f"{name} is quantised to {facts.title}, which runs on Blackwell GPUs only, with TensorRT or "
                "TensorRT-RTX; use the bundle that it was quantised from"
            )
    for name, facts in wrong:
        raise EngineError(f"{name} is quantised to {facts.title}, {why}")


def formats_in(manifest: Manifest) -> dict[str, tuple[QuantFormat, ...]]:
    """The formats of every part that has quantised linears."""
    return {name: found for name, part in manifest.parts.items() if (found := formats_of(part))}
