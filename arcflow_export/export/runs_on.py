"""A bundle that was just exported -> what it will run on, and what to export for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from arcflow_runtime.disk.bundle import Bundle


@dataclass(frozen=True)
class RunsOn:
    """Whether ONNX Runtime's CPU provider runs the bundle, and whether TensorRT can build it."""

    onnxruntime: bool
    tensorrt: bool

    def sentence(self) -> str:
        """For the end of an export."""
        if not self.onnxruntime and not self.tensorrt:
            return (
                "runs on: neither ONNX Runtime on a CPU, which has no bfloat16, nor TensorRT, which has no attention "
                "in float32 as one operator; export with --opset 20 for TensorRT, or all parts in float32 for a CPU"
            )
        if not self.onnxruntime:
            return (
                "runs on: TensorRT, from engines that arcflow build makes; ONNX Runtime has no bfloat16 on a CPU, "
                "for that export with --dtype float32"
            )
        if not self.tensorrt:
            return (
                "runs on: ONNX Runtime on a CPU; TensorRT has no attention in float32 as one operator, "
                "for that export with --opset 20"
            )
        return "runs on: ONNX Runtime on a CPU, and TensorRT, from engines that arcflow build makes"


def runs_on(bundle: Bundle) -> RunsOn:
    """What a bundle runs on, by its parts' dtypes and operators; reads the graphs without weights."""
    parts = bundle.manifest.parts.values()
    attention = any(
        node.op_type == "Attention"
        for part in parts
        if part.precision == "float32"
        for node in onnx.load(bundle.path(part.graph), load_external_data=False).graph.node
    )
    return RunsOn(all(p.precision != "bfloat16" for p in parts), not attention)
