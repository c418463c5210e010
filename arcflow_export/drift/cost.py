"""What the gate will take: two bundles and what to draw -> the sums that `costs.gate_cost` needs."""

from __future__ import annotations

from arcflow_runtime.bundle import Bundle

from ..costs import Gate
from ..emulate import load_graph
from ..work import PartWork, bundle_work, call_sizes, node_flops
from .cases import Scene
from .comparable import same_parts
from .compare import kept_bytes
from .graphs import linears


def gate_work(
    candidate: Bundle, reference: Bundle, scene: Scene, cases: int, end_to_end: bool
) -> tuple[dict[str, PartWork], Gate]:
    """The reference's parts, and what is run of both bundles.

    Args:
        candidate: the bundle to check.
        reference: what it is compared with.
        scene: what every case is drawn with.
        cases: how many.
        end_to_end: whether the candidate's graphs draw the images, rather than its engines.
    """
    sizes = call_sizes(scene.height_px, scene.width_px, scene.max_sequence_length, scene.num_inference_steps)
    parts = {name: bundle_work(reference, name, sizes) for name in reference.manifest.parts}
    quantized = [linear for linear in linears(load_graph(candidate, "backbone")).values() if linear.quantized]
    share = sum(node_flops(linear.node, sizes) for linear in quantized) / max(parts["backbone"].flops, 1)
    same = same_parts(candidate, reference)
    return parts, Gate(
        cases,
        scene.num_inference_steps,
        text_differs=not {p for p in parts if p.startswith("text_encoder")} <= same,
        decoder_differs="vae_decoder" not in same,
        layers=share,
        kept_bytes=kept_bytes(reference, scene, cases),
        end_to_end=end_to_end,
    )
