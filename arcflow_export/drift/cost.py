"""Count the work of a drift gate, for its cost estimate: two bundles and settings -> the input of `costs.gate_cost`."""

from __future__ import annotations

from arcflow_export.costs.costs import GateWork
from arcflow_export.costs.work import PartWork, bundle_work, call_sizes, node_flops
from arcflow_export.drift.cases import ImageSettings
from arcflow_export.drift.comparable import same_parts
from arcflow_export.drift.compare import kept_bytes
from arcflow_export.drift.graphs import linears
from arcflow_export.emulate.emulate import load_graph
from arcflow_runtime.disk.bundle import Bundle


def gate_work(
    candidate: Bundle, reference: Bundle, scene: ImageSettings, cases: int, end_to_end: bool
) -> tuple[dict[str, PartWork], GateWork]:
    """Count the work of the reference's parts, and what the gate runs of both bundles.

    Args:
        candidate: the bundle to check.
        reference: the bundle to compare it with.
        scene: image size, steps, guidance and text length for all cases.
        cases: number of cases.
        end_to_end: True if the candidate's graphs generate the images, False if its engines do.
    """
    sizes = call_sizes(scene.height_px, scene.width_px, scene.max_sequence_length, scene.num_inference_steps)
    parts = {name: bundle_work(reference, name, sizes) for name in reference.manifest.parts}
    quantized = [linear for linear in linears(load_graph(candidate, "backbone")).values() if linear.quantized]
    share = sum(node_flops(linear.node, sizes) for linear in quantized) / max(parts["backbone"].flops, 1)
    same = same_parts(candidate, reference)
    return parts, GateWork(
        cases,
        scene.calls,
        text_differs=not {p for p in parts if p.startswith("text_encoder")} <= same,
        decoder_differs="vae_decoder" not in same,
        layers=share,
        kept_bytes=kept_bytes(reference, scene, cases),
        end_to_end=end_to_end,
    )
