"""Parts of FLUX.1-dev's real shapes with random weights, put into a bundle of the tiny golden student."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from fullsize import random_chunks
from fullsize_models import LOGWEIGHTS_CHANNELS, NUM_GAUSSIANS, components

from arcflow_export.checkpoint.sources import Location
from arcflow_export.export.export import export_bundle, plan_export
from arcflow_export.export.write import attach, initializer_name, write_weights
from arcflow_export.graph.trace import trace
from arcflow_export.models.layers import ModelPart, parameters
from arcflow_export.options import ExportOptions
from arcflow_export.student.load import Outline, load_student
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.manifest import DType

_GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "flux-tiny"
_SEED = 0


class RandomWeights:
    """Random finite bfloat16 tensors with values of at most 2^-7; a tensor depends only on its name.

    The bytes are made in the order in which the file stores them.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self._shapes = shapes

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`."""
        return self._shapes[key]

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key` in flat pieces; the writer only joins them."""
        for chunk in random_chunks(_SEED, key, torch.Size(self._shapes[key]).numel() * dtype.itemsize):
            yield torch.from_numpy(chunk).view(dtype)

    def uncache(self) -> None:
        """Do nothing: no file was read."""


def make_tiny(root: Path, dtype: DType = "bfloat16", opset: int = ExportOptions().opset) -> Bundle:
    """Export the tiny golden FLUX student to `root`."""
    student = load_student(Location(str(_GOLDEN / "base")), Location(str(_GOLDEN / "adapter")), [])
    return Bundle.open(export_bundle(plan_export(student, ExportOptions(dtype, opset=opset)), root, "benchmark"))


def flux_parts(folder: Path, dtype: DType, blocks: tuple[int, int] | None = None) -> dict[str, ModelPart]:
    """The parts of the released FLUX.1-dev student, without weights.

    Args:
        folder: receives the configs of the text encoders.
        dtype: dtype of all parts.
        blocks: numbers of double and single blocks, the first also that of T5's layers; None for those of the released
            model.
    """
    configs = {c.folder: c.config for c in components("flux")}
    if blocks is not None:
        configs["text_encoder_2"] = {**configs["text_encoder_2"], "num_layers": blocks[0]}
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(configs[name]), encoding="utf-8")
    config = configs["transformer"]
    if blocks is not None:
        config = {**config, "num_layers": blocks[0], "num_single_layers": blocks[1]}
    outline = Outline("flux", folder, config, configs["vae"], NUM_GAUSSIANS, LOGWEIGHTS_CHANNELS, {})
    return {part.name: part for part in outline.parts(dtype)}


def put_part(bundle: Bundle, part: ModelPart) -> Bundle:
    """Replace the bundle's part of this name by `part` with random weights."""
    root, m = bundle.root, bundle.manifest
    params = [dataclasses.replace(p, transform="none") for p in parameters(part)]
    model = trace(part, m.opset)
    live = [p for p in params if initializer_name(p) in model.graph.initializers]
    weights, graph = root / f"{part.name}.safetensors", root / f"{part.name}.onnx"
    source = RandomWeights({p.key: p.shape for p in live if p.key is not None})
    entry, placed = write_weights(weights, live, source, lambda _: None)
    attach(model, weights, placed)
    ir.save(model, graph)
    count = sum(math.prod(p.shape) for p in live if p.key is not None)
    spec = dataclasses.replace(m.parts[part.name], parameters=count, inputs=part.inputs, outputs=part.outputs)
    files = {weights.name: entry, graph.name: b.FileEntry(graph.stat().st_size, sha256_file(graph))}
    m = dataclasses.replace(m, parts={**m.parts, part.name: spec}, files={**m.files, **files})
    (root / b.MANIFEST).write_text(m.to_json(), encoding="utf-8")
    return Bundle.open(root)
