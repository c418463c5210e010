"""A cache of traced parts for tests: a part -> the ONNX model that `arcflow_export.graph.trace._convert` makes of it.

Tracing takes most of an export's time, and many tests export the same parts. Only the trace is cached; passes, weights
and everything after it run at each export. The key is a hash of the part's pickled module, its inputs and outputs, and
the code of the exporter.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch
from filelock import FileLock
from transformers import PreTrainedConfig

import arcflow_distill
import arcflow_export
from arcflow_export.graph import passes, trace
from arcflow_export.models.layers import ModelPart

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "diffusers", "transformers")
_convert = trace._convert


class Traces:
    """The cache in the folder `root`, which several processes may share. Traces made by other code are removed."""

    def __init__(self, root: Path) -> None:
        self._folder = root / _digest_of_code()
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in root.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)

    def convert(self, part: ModelPart, opset: int) -> ir.Model:
        """Like `trace._convert`, but returns the cached result for an equal part."""
        path = self._folder / f"{part.name}-{_digest_of(part, opset)}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                model = _convert(part, opset)
                for name, value in model.graph.initializers.items():
                    # A weight has no values yet, so a reference to a file that does not exist stands for it.
                    if not passes._is_real(value):
                        value.const_value = ir.ExternalTensor(
                            "none", None, None, value.dtype, shape=value.shape, name=name
                        )
                scratch = path.with_suffix(f".{os.getpid()}")
                ir.save(model, scratch)
                scratch.rename(path)
            model = ir.load(path)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = None
        return model


def _digest_of_code() -> str:
    digest = hashlib.sha256()
    for package in (arcflow_export, arcflow_distill):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    digest.update(repr([metadata.version(name) for name in _LIBRARIES]).encode())
    return digest.hexdigest()[:16]


class _Pickler(pickle.Pickler):
    """Pickles a part for hashing.

    Tensors are written as shape and dtype, with a number that shows which are the same tensor. Everything else is
    written by value, without object identities or paths.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True
        self._tensors: list[torch.Tensor] = []

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return None
        place = next((i for i, x in enumerate(self._tensors) if x is value), len(self._tensors))
        if place == len(self._tensors):
            self._tensors.append(value)
        return place, tuple(value.shape), str(value.dtype), str(value.device)

    def reducer_override(self, value: object) -> object:
        if isinstance(value, PreTrainedConfig):
            return dict, (sorted((k, repr(v)) for k, v in value.to_dict().items() if k != "_name_or_path"),)
        return NotImplemented


def _digest_of(part: ModelPart, opset: int) -> str:
    file = io.BytesIO()
    names = [part.rename(name) for name in part.module.state_dict()]
    _Pickler(file).dump((part.module, part.inputs, part.outputs, part.precision, names, opset))
    return hashlib.sha256(file.getvalue()).hexdigest()[:16]
