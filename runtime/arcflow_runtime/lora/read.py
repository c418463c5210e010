"""Read a LoRA file: path and family -> `LoraFile`."""

from __future__ import annotations

from pathlib import Path

from arcflow_runtime.lora.layers import LoraFile


def read_lora(path: Path, family: str) -> LoraFile:
    """Read a LoRA file.

    Args:
        path: a .safetensors file. An adapter_config.json beside it is read too.
        family: of the model, as in a bundle's manifest: "flux" or "qwen-image".

    Raises:
        LoraError: the file is damaged, is not a LoRA or is one for another model, or holds something that is not
            supported. The message names the first key.
    """
    raise NotImplementedError
