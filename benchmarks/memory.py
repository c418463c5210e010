"""What FLUX.1-dev and Qwen-Image need of a GPU's memory: the manifests of their real sizes -> JSON for docs/memory.md.

No weights are needed: the sizes come from the models' configs, and the activations from graphs that are traced here
with two blocks of each kind. A transformer frees a block's results before the next one, so more blocks need no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
from fullsize_models import components, model_index
from machine import describe as describe_machine

from arcflow_export.checkpoint.sources import Location
from arcflow_export.export.write import initializer_name, num_bytes
from arcflow_export.families import facts
from arcflow_export.formats.policy import load_policy, select
from arcflow_export.graph.trace import trace
from arcflow_export.models.layers import ModelPart, linear_names, parameters
from arcflow_export.options import SHIFT, STEPS, TIMESTEP_RATIO, ExportOptions
from arcflow_export.student.load import Outline, read_outline
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.signatures import bakes_modulation
from arcflow_runtime.engines.modes import TENSORRT
from arcflow_runtime.memory.activations import PartGraph
from arcflow_runtime.memory.sums import ImageSize, part_inputs

SIDES_PX = (512, 1024)
#: Model -> its columns in the table: what is in FP8, and the policy that chose it.
POLICIES = {
    "flux": {"bf16": None, "FP8 backbone": "flux", "FP8 backbone and T5": "flux-t5"},
    "qwen": {"bf16": None, "FP8 backbone": "qwen-image"},
}
#: Settings of a config that give a number of blocks.
_DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_decoder_layers")
_BLOCKS = 2
_OPTIONS = ExportOptions("bfloat16")


def write_configs(model: str, folder: Path, blocks: int | None) -> Outline:
    """Write a checkpoint's configs, with at most `blocks` blocks of each kind, and read them as an outline."""
    for component in components(model):
        config = dict(component.config)
        if blocks is not None and component.folder not in ("vae", "adapter"):
            config |= {key: min(config[key], blocks) for key in _DEPTHS if isinstance(config.get(key), int)}
            if "text_config" in config:
                config["text_config"] = {**config["text_config"], "num_hidden_layers": blocks}
        path = folder / ("" if component.folder == "adapter" else "base") / component.folder
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
    (folder / "base" / "model_index.json").write_text(json.dumps(model_index(model)))
    return read_outline(Location(str(folder / "base")), Location(str(folder / "adapter")))


def shipped(outline: Outline) -> list[ModelPart]:
    """The parts whose weights are in a bundle; Qwen-Image's conditioner is a table."""
    parts = outline.parts(_OPTIONS.part_dtype)
    return [p for p in parts if p.name != "conditioner" or not bakes_modulation(outline.family)]


def make_manifest(outline: Outline, parts: list[ModelPart]) -> b.Manifest:
    """The manifest that an export would write, as far as sums of memory read it."""
    found, sizes = facts(outline.family), {p.name: sum(map(num_bytes, parameters(p))) for p in parts}
    source = b.Source("benchmark", None, "0" * 64)
    px = b.SizeRange(16, _OPTIONS.max_px)
    table = b.ModulationTable("modulation.safetensors", STEPS) if bakes_modulation(outline.family) else None
    return b.Manifest(
        family=outline.family,  # type: ignore[arg-type]
        dtype=_OPTIONS.dtype,
        reference_dtype=_OPTIONS.reference_dtype,
        opset=_OPTIONS.opset,
        guidance=outline.guidance,
        schedule=b.Schedule(SHIFT, TIMESTEP_RATIO, STEPS[0]),
        latents=b.Latents(outline.config["in_channels"] // 4, 2, 8, outline.num_gaussians, outline.logweights_channels),
        rotary=b.Rotary(10000.0, tuple(outline.config["axes_dims_rope"])),
        text=b.PromptFormat(
            _OPTIONS.max_sequence_length,
            template=found.template,
            drop_tokens=found.drop_tokens,
            clip_tokens=found.clip_tokens,
        ),
        ranges=b.Ranges(b.SizeRange(1, 32), px, px),
        parts={
            p.name: b.Part(
                f"{p.name}.onnx",
                f"{p.name}.safetensors",
                str(p.precision).removeprefix("torch."),  # type: ignore[arg-type]
                sum(prod(q.shape) for q in parameters(p) if q.key is not None),
                p.inputs,
                p.outputs,
            )
            for p in parts
        },
        tokenizers={},
        files={f"{name}.safetensors": b.FileEntry(size, "0" * 64) for name, size in sizes.items()},
        provenance=b.Provenance("benchmark", "", {}, source, source),
        modulation=table,
    )


def quantized_bytes(part: ModelPart, policy: str | None) -> int:
    """Bytes of a part's weights if a policy's linears are in FP8, with scales per output channel and of the input."""
    total = sum(map(num_bytes, parameters(part)))
    patterns = None if policy is None else load_policy(policy).parts.get(part.name)
    if patterns is None:
        return total
    shapes = {initializer_name(p): p for p in parameters(part)}
    for name in select(patterns, part.name, list(linear_names(part))):
        weight = shapes[f"{name}.weight"]
        item, (_, out) = weight.dtype.itemsize, weight.shape
        total += (1 - item) * prod(weight.shape) + item * (out + 1)
    return total


def graph_of(part: ModelPart, folder: Path) -> PartGraph:
    """Trace a part and read the graph as the runtime does; its weights are placeholders."""
    model = trace(part, _OPTIONS.opset)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.shape is not None and value.dtype is not None
            value.const_value = ir.ExternalTensor(
                "weights", 0, 0, value.dtype, shape=value.shape, name=name, base_dir=folder
            )
    path = folder / f"{part.name}.onnx"
    ir.save(model, path)
    graph = PartGraph.parse(path.read_bytes())
    assert graph is not None
    return graph


def measure(model: str) -> dict[str, Any]:
    """Manifest, weights by policy and bounds of activations by size of one model."""
    with tempfile.TemporaryDirectory() as folder:
        whole = write_configs(model, Path(folder) / "whole", None)
        parts = shipped(whole)
        manifest = make_manifest(whole, parts)
        weights: Mapping[str, Mapping[str, int]] = {
            label: {p.name: quantized_bytes(p, policy) for p in parts} for label, policy in POLICIES[model].items()
        }
        shallow = write_configs(model, Path(folder) / "shallow", _BLOCKS)
        graphs = {p.name: graph_of(p, Path(folder)) for p in shipped(shallow)}
    activations = {}
    for side in SIDES_PX:
        size = ImageSize(1, side, side, manifest.text.max_sequence_length, manifest.schedule.num_inference_steps)
        inputs = part_inputs(manifest, size)
        activations[str(side)] = {p: graph.activation_bytes(inputs[p], TENSORRT) for p, graph in graphs.items()}
    return {"manifest": dataclasses.asdict(manifest), "weights": weights, "activations": activations}


def main() -> int:
    """Write the JSON; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = Path(__file__).parent / "results" / "memory.json"
    parser.add_argument("--json", type=Path, metavar="FILE", default=target, help="default: %(default)s")
    args = parser.parse_args()
    models = {model: measure(model) for model in POLICIES}
    result = {"command": "python benchmarks/memory.py", "machine": describe_machine(), "models": models}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for model, found in models.items():
        print(model, json.dumps({key: found[key] for key in ("weights", "activations")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
