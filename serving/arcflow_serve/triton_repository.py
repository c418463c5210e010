"""Write a model repository for NVIDIA's Triton Inference Server: a bundle -> NAME/config.pbtxt and NAME/1/model.py."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from arcflow_runtime.backends import AUTO, DEFAULT_BACKEND, ON_CPU, open_backend
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import whole_directory
from arcflow_runtime.errors import RequestError
from arcflow_runtime.lora.open import open_lora
from arcflow_serve.models import check_loras
from arcflow_serve.settings import Settings, default_lanes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MODEL = '''"""Written by arcflow triton. The package arcflow, which Triton's Python must have, holds the model."""

from arcflow_serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
#: Of each input: Triton's type, and whether a request may leave it out.
_INPUTS = {
    "prompt": ("TYPE_STRING", False),
    "seed": ("TYPE_UINT64", True),
    "width": ("TYPE_INT32", True),
    "height": ("TYPE_INT32", True),
    "num_inference_steps": ("TYPE_INT32", True),
    "guidance_scale": ("TYPE_FP64", True),
    "negative_prompt": ("TYPE_STRING", True),
    "true_cfg_scale": ("TYPE_FP64", True),
    "loras": ("TYPE_STRING", True),
}


@dataclass(frozen=True)
class TritonOptions:
    """What the configuration says beside the bundle's own facts.

    Attributes:
        backend: the library that runs the graphs, as for `Pipeline.load`.
        instances: processes that generate images, each with the bundle in its memory: on this machine's CPU, or on each
            of its GPUs. None is one for each GPU, and as many as a service has lanes on a CPU.
        threads: CPU threads of an instance; None shares the cores among the instances.
        max_batch: most images that an instance generates at a time.
        max_queue: most requests that may wait.
        deadline_s: a request that has waited for so long is answered with an error.
        bundle_path: where the server finds the bundle; None is where it is now.
        loras: files of LoRAs that requests may use; each is named after its file.
        lora_folder: where the server finds those files; None is where they are now.
    """

    backend: str = DEFAULT_BACKEND
    instances: int | None = None
    threads: int | None = None
    max_batch: int = Settings.max_batch
    max_queue: int = Settings.max_queue
    deadline_s: float = Settings.deadline_s
    bundle_path: str | None = None
    loras: tuple[Path, ...] = ()
    lora_folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("instances", "threads", "max_batch", "max_queue"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RequestError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not self.deadline_s > 0:
            raise RequestError(f"--deadline must be a number of seconds above 0, got {self.deadline_s}")
        if self.lora_folder is not None and not self.loras:
            raise RequestError("--lora-folder needs --lora, which names the files in it; give it, or leave both out")
        if self.backend == AUTO:
            raise RequestError(f"--backend must be named, got {AUTO!r}: the configuration says whether there is a GPU")

    @property
    def on_cpu(self) -> bool:
        """True if instances need no GPU."""
        return self.backend in ON_CPU

    def settings(self) -> Settings:
        """The settings of one instance; also checks that its threads fit the cores."""
        lanes = (self.instances or default_lanes()) if self.on_cpu else 1
        return Settings(backend=self.backend, lanes=lanes, threads=self.threads, max_batch=self.max_batch)


def write_repository(bundle: Path, out: Path, name: str | None, options: TritonOptions) -> Path:
    """Add a bundle to the model repository `out`, which is made if it is not there.

    Args:
        bundle: directory of a bundle, which is not copied.
        out: the repository.
        name: of the model; None is the bundle's directory.
        options: of the configuration.

    Returns:
        The model's directory.

    Raises:
        BundleError: `bundle` is not a bundle.
        EngineError: the backend is installed here and cannot run the bundle.
        LoraError: a LoRA cannot be read, or does not fit the bundle's slots.
        RequestError: the name or an option is wrong, or the repository has a model of this name.
    """
    bundle = bundle.absolute()
    name = bundle.name if name is None else name
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"the model's name must be letters, digits, '.', '_' and '-', got {name!r}; choose one with --name"
        )
    folder = out / name
    if folder.exists():
        raise RequestError(f"{out} must have no model {name!r} yet; remove {folder}, or choose another --name")
    opened = Bundle.open(bundle)
    if options.on_cpu:
        # A repository for a GPU may be written on a machine without one.
        open_backend(options.backend).check(opened)
    check_loras(options.loras, [opened.manifest])
    for file in options.loras:
        open_lora(file, file.stem, opened.manifest)
    text = _config(name, opened, options, options.bundle_path or str(bundle))
    out.mkdir(parents=True, exist_ok=True)
    with whole_directory(folder) as partial:
        (partial / "config.pbtxt").write_text(text, encoding="utf-8")
        (partial / "1").mkdir()
        (partial / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
    return folder


def _config(name: str, bundle: Bundle, options: TritonOptions, bundle_path: str) -> str:
    """Triton's `ModelConfig` as protobuf text."""
    settings = options.settings()
    batch = min(options.max_batch, bundle.manifest.ranges.batch.max)
    inputs = [
        f"  {{ name: {_quote(key)} data_type: {kind} dims: [ 1 ]{' optional: true' if optional else ''} }}"
        for key, (kind, optional) in _INPUTS.items()
    ]
    group = (
        f"count: {settings.lanes} kind: KIND_CPU"
        if options.on_cpu
        else f"count: {options.instances or 1} kind: KIND_GPU"
    )
    parameters = {"bundle": bundle_path, "backend": options.backend}
    if options.loras:
        folder = options.lora_folder
        files = [str(Path(folder) / f.name if folder is not None else f.absolute()) for f in options.loras]
        parameters["loras"] = json.dumps(files, ensure_ascii=False)
    if settings.engine_threads is not None:
        parameters["threads"] = str(settings.engine_threads)
    lines = [
        f"name: {_quote(name)}",
        'backend: "python"',
        f"max_batch_size: {batch}",
        "input [",
        ",\n".join(inputs),
        "]",
        "output [",
        '  { name: "image" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] },',
        '  { name: "image_seed" data_type: TYPE_UINT64 dims: [ 1 ] },',
        '  { name: "batch_size" data_type: TYPE_INT32 dims: [ 1 ] }',
        "]",
        # No delay: an instance takes what waits. To wait for a batch to fill costs more than it gains.
        "dynamic_batching {",
        "  default_queue_policy {",
        f"    max_queue_size: {options.max_queue}",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {round(options.deadline_s * 1e6)}",
        "  }",
        "}",
        f"instance_group [ {{ {group} }} ]",
        *(f"parameters {{ key: {_quote(k)} value {{ string_value: {_quote(v)} }} }}" for k, v in parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """A string of protobuf's text format, whose escapes are those of JSON for printable text."""
    if not text.isprintable():
        raise RequestError(f"names and paths of a Triton model must be printable, got {text!r}; rename it")
    return json.dumps(text, ensure_ascii=False)
