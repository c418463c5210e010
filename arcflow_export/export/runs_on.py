"""Tell which engines can run a bundle, and how to export for the others. `arcflow export` prints it at the end."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from arcflow_runtime.disk.bundle import Bundle


@dataclass(frozen=True)
class RunsOn:
    """True for each engine that can run the bundle: ONNX Runtime's CPU provider, and TensorRT.

    OpenVINO runs every exported bundle on a CPU.
    """

    onnxruntime: bool
    tensorrt: bool

    def sentence(self) -> str:
        """One sentence for the terminal."""
        if not self.onnxruntime and not self.tensorrt:
            return (
                "runs on: OpenVINO on a CPU. ONNX Runtime has no bfloat16 on a CPU: export all parts in float32 for "
                "it. TensorRT has no float32 Attention operator: export with --opset 20 for it"
            )
        if not self.onnxruntime:
            return (
                "runs on: OpenVINO on a CPU, and TensorRT after `arcflow build`. ONNX Runtime has no bfloat16 "
                "on a CPU: export with --dtype float32 for it"
            )
        if not self.tensorrt:
            return (
                "runs on: ONNX Runtime and OpenVINO on a CPU. TensorRT has no float32 Attention operator: "
                "export with --opset 20 for it"
            )
        return "runs on: ONNX Runtime and OpenVINO on a CPU, and TensorRT after `arcflow build`"


def runs_on(bundle: Bundle) -> RunsOn:
    """Find out which engines can run a bundle, from its parts' dtypes and operators; reads graphs without weights."""
    parts = bundle.manifest.parts.values()
    attention = any(
        node.op_type == "Attention"
        for part in parts
        if part.precision == "float32"
        for node in onnx.load(bundle.path(part.graph), load_external_data=False).graph.node
    )
    return RunsOn(all(p.precision != "bfloat16" for p in parts), not attention)
