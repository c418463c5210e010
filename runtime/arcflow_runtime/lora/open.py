"""Open a LoRA for a bundle: a file of any tool, or one that `arcflow lora convert` wrote -> a `FittedLora`.

`Pipeline.load_lora` and `arcflow lora` call it.
"""

from __future__ import annotations

from pathlib import Path

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.lora.converted import is_converted, read_converted
from arcflow_runtime.lora.read import read_lora
from arcflow_runtime.lora.slots import FittedLora, fit


def open_lora(path: Path, name: str, manifest: Manifest) -> FittedLora:
    """Read a LoRA and fit it to a bundle's slots.

    Args:
        path: the file.
        name: what to call the LoRA in messages.
        manifest: the bundle's.

    Raises:
        LoraError: the file cannot be read, or does not fit; the message names the layer.
    """
    if is_converted(path):
        return read_converted(path, name, manifest)
    return fit(name, read_lora(path, manifest.family, manifest.sampler).layers, manifest)
