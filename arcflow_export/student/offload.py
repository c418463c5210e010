"""Load diffusers' and transformers' modules whose weights stay in the checkpoint's files until they are used.

A module is created on the meta device. Just before its forward, its weights are read from the checkpoint's safetensors;
after it they are dropped. So only one module's weights are in memory at a time, and nothing is written.

The hooks are torch's own. accelerate's hooks replace a module's `forward`, and modelopt replaces a linear's class to
add its quantizer. With both, either the quantizer would never run or the weights would never be read.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from torch import nn

from arcflow_export.errors import SourceError
from arcflow_export.families import facts
from arcflow_export.student.load import Student
from arcflow_export.student.lora import Factors

#: A flag of Linux's madvise since 5.14; Python's mmap has no constant for it.
_MADV_POPULATE_READ = 22


class DiskWeights:
    """The weights of one component, read by parameter name."""

    def __init__(self, index: Mapping[str, Mapping[str, str]], where: str):
        """Store accelerate's `index` (parameter name -> safetensors_file, weight_name, dtype) and a name for errors."""
        self._index, self._where = index, where
        self._files = OffloadedWeightsLoader(index=index)
        self._loras: dict[str, list[Factors]] = {}

    def add_lora(self, name: str, pair: Factors) -> None:
        """Merge a LoRA into weight `name` each time that it is read."""
        self._loras.setdefault(name, []).append(pair)

    def check(self, name: str) -> None:
        """Check that the checkpoint has weight `name`.

        Raises:
            SourceError: the weight is missing.
        """
        if name not in self._index:
            raise SourceError(f"{self._where} has no tensor {name!r}; is the checkpoint complete?")

    def read(self, name: str) -> torch.Tensor:
        """Read a weight, in the dtype that `from_pretrained` would give it."""
        weight = self._files[name]
        _map_pages(weight)
        if name in self._loras:
            weight = weight.clone()  # the tensor may be a view of the mapped file, which must not change
            for pair in self._loras[name]:
                merge(weight, pair)
        return weight


def _map_pages(tensor: torch.Tensor) -> None:
    """Map a tensor's file pages in one call: faulting them in one by one can take as long as the matrix product."""
    if sys.platform == "linux":  # only a hint: older kernels ignore it
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() - start + tensor.nbytes
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_READ)


def merge(weight: torch.Tensor, pair: Factors) -> None:
    """Add a LoRA to a linear's weight [out, in] in place; the product B A is computed in float64."""
    weight.add_(pair.b.double() @ pair.a.double())


def empty_components(student: Student, dtypes: Mapping[str, torch.dtype]) -> dict[str, tuple[nn.Module, DiskWeights]]:
    """Create the base's transformer and text encoders on the meta device, each with its weights on disk, by component.

    Args:
        student: from `load_student`.
        dtypes: dtype of each component.

    Raises:
        SourceError: a text encoder's checkpoint lacks a weight.
    """
    made = {"transformer": _transformer(student, dtypes["transformer"])}
    return made | {name: _encoder(student, name, dtypes[name]) for name in facts(student.family).encoders}


def _transformer(student: Student, dtype: torch.dtype) -> tuple[nn.Module, DiskWeights]:
    # diffusers' own disk offload first copies all weights into a folder.
    cls, folder = getattr(diffusers, facts(student.family).transformer), student.base.path / "transformer"
    assert not cls._keep_in_fp32_modules
    with init_empty_weights():
        module = cls.from_config(cls.load_config(folder))
    kept = {
        name: {"safetensors_file": str(ref.path), "weight_name": ref.key, "dtype": _name(dtype)}
        for name, ref in student.indexes["transformer"].items()
    }
    return nn.Module.to(module, dtype).eval(), DiskWeights(kept, str(folder))


def _encoder(student: Student, name: str, dtype: torch.dtype) -> tuple[nn.Module, DiskWeights]:
    """Let transformers map names and tie weights, then keep its index and remove accelerate's hooks."""
    folder = student.base.path / name
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns about the hooks that it adds
    module = getattr(transformers, facts(student.family).encoders[name]).from_pretrained(
        folder, dtype=dtype, device_map={"": "disk"}, use_safetensors=True
    )
    maps = (getattr(getattr(m, "_hf_hook", None), "weights_map", None) for m in module.modules())
    index = next(found.dataset.index for found in maps if found is not None)
    weights = DiskWeights(index, str(folder))
    for path, _ in module.named_parameters():
        weights.check(path)
    remove_hook_from_submodules(module)
    for child in module.modules():
        child.__dict__.pop("forward", None)  # accelerate leaves it; it would hide the `forward` of modelopt's class
    if dtype == torch.float16:  # transformers ignores `_keep_in_fp32_modules` for weights on disk
        kept = set(module._keep_in_fp32_modules or ())
        for path, child in module.named_modules():
            if path.rpartition(".")[2] in kept:
                child.float()
                index |= {
                    f"{path}.{p}": index[f"{path}.{p}"] | {"dtype": "float32"} for p, _ in child.named_parameters()
                }
    return module, weights


def read_when_used(root: nn.Module, weights: DiskWeights, device: str) -> None:
    """Make every module with parameters on the meta device read them before its forward and drop them after it.

    Args:
        root: the component; peft may have wrapped its linears.
        weights: the component's weights.
        device: torch device to run on; parameters that are in memory already are moved there.

    Raises:
        SourceError: the checkpoint lacks a weight.
    """
    for path, module in root.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names = {p: f"{path}.{p}".replace(".base_layer.", ".") for p, value in own.items() if value.is_meta}
        for name in names.values():
            weights.check(name)
        if names:
            reader = _Reader(weights, names, device)
            module.register_forward_pre_hook(reader.read, prepend=True)
            module.register_forward_hook(reader.drop, always_call=True)
        for tensor in (*own.values(), *module.buffers(recurse=False)):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
    # This hook reads no weights. diffusers' pipelines look at it to find the device of the component's inputs.
    add_hook_to_module(root, AlignDevicesHook(execution_device=device))


class _Reader:
    """The hooks of one module; `names` maps its parameters to names in `weights`."""

    def __init__(self, weights: DiskWeights, names: dict[str, str], device: str):
        self._weights, self._names, self._device = weights, names, device
        self._empty: dict[str, nn.Parameter | None] = {}

    def read(self, module: nn.Module, args: Any) -> None:
        for name, source in self._names.items():
            empty = module._parameters[name]
            assert empty is not None
            # The parameter may have been cast to another dtype since it was created, so use its present dtype.
            value = self._weights.read(source).to(self._device, empty.dtype)
            self._empty[name] = empty
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def drop(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self._empty)
        self._empty.clear()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
