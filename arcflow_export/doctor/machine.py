"""Check a machine for running bundles: Python, memory, disk, GPU, driver and the libraries of the backends."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from arcflow_export.doctor.findings import Finding, State, failure
from arcflow_export.doctor.libraries import check_libraries
from arcflow_runtime.backends import AUTO, ON_CPU
from arcflow_runtime.engines.gpus import Driver, Gpu, find_driver, find_gpu
from arcflow_runtime.engines.host_memory import available_bytes
from arcflow_runtime.engines.tensorrt_library import LIBRARIES
from arcflow_runtime.errors import EngineError
from arcflow_runtime.installing import command_for_extra

#: The CUDA version that cuda-bindings and NVRTC of the extra `gpu` are for.
CUDA_MAJOR = 13
_GPU_EXTRA = "gpu"


def check_machine(folder: Path, backend: str = AUTO) -> list[Finding]:
    """Check this machine for running bundles.

    Args:
        folder: the disk to look at.
        backend: the backend to run them with, whose library is then needed; "auto" needs any.
    """
    gpu, driver = find_gpu(), find_driver()
    return [
        _python(),
        check_libraries("", "running", needed=True),
        _memory(),
        _disk(folder),
        _gpu(gpu, driver, needed=backend not in (AUTO, *ON_CPU)),
        *_driver(driver),
        *_backends(gpu, backend),
    ]


def _python() -> Finding:
    try:
        version = f"arcflow {metadata.version('arcflow')}"
    except metadata.PackageNotFoundError:
        version = "arcflow from a checkout"
    return Finding("python", "ok", f"Python {platform.python_version()}, {version}, {platform.platform(terse=True)}")


def _memory() -> Finding:
    free = available_bytes()
    if free is None:
        return Finding("memory", "note", "this system does not say how much is free")
    return Finding("memory", "ok", f"{free / (1 << 30):.1f} GiB free, {os.cpu_count()} cores")


def _disk(folder: Path) -> Finding:
    return Finding("disk", "ok", f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder}")


def _gpu(gpu: Gpu | None, driver: Driver | None, needed: bool) -> Finding:
    if gpu is not None:
        assert driver is not None, "the driver found the GPU"
        return Finding("gpu", "ok", f"{gpu.name}, {gpu.target}, {driver.memory_bytes / 1e9:.1f} GB")
    state: State = "fail" if needed else "note"
    if driver is None:
        do = "install NVIDIA's driver for the GPU, or choose --backend onnxruntime" if needed else ""
        return Finding("gpu", state, "no NVIDIA driver, so images are generated on the CPU", do)
    if hidden := os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        found = f"the driver shows no GPU with CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
    else:
        found = "the driver shows no GPU"
    do = "set CUDA_VISIBLE_DEVICES to a GPU that nvidia-smi lists" if hidden else "run nvidia-smi, which says why"
    return Finding("gpu", state, found, do)


def _driver(driver: Driver | None) -> list[Finding]:
    if driver is None:
        return []
    named = f"version {driver.version}, " if driver.version else ""
    found = f"{named}for CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    if driver.cuda[0] >= CUDA_MAJOR:
        return [Finding("driver", "ok", found)]
    return [Finding("driver", "fail", found, f"install a driver for CUDA {CUDA_MAJOR} or newer; nvidia-smi shows it")]


def _backends(gpu: Gpu | None, wanted: str) -> list[Finding]:
    """A line for every backend; the wanted one must be there, and any backend for a GPU that is here."""
    found = [Finding("backend onnxruntime", "ok", f"onnxruntime {_version('onnxruntime', 'onnxruntime-gpu')}, CPU")]
    found.append(_library("openvino", ("openvino",), "openvino", wanted))
    for name, library in LIBRARIES.items():
        try:
            module = library.load()
        except EngineError as e:
            missing = failure(f"backend {name}", str(e))
            found.append(missing if wanted == name else Finding(missing.name, "note", missing.found, missing.do))
        else:
            found.append(_fits(name, f"{library.name} {module.__version__}", library.targets, gpu, wanted))
    found.append(_library("onnxruntime-cuda", ("onnxruntime-gpu",), None, wanted))
    if gpu is not None or wanted not in (AUTO, *ON_CPU):
        found.append(check_libraries(_GPU_EXTRA, "a GPU", needed=wanted not in (AUTO, *ON_CPU)))
    return found


def _fits(name: str, version: str, targets: Sequence[str], gpu: Gpu | None, wanted: str) -> Finding:
    if gpu is None or not targets or gpu.target in targets:
        return Finding(f"backend {name}", "ok", version)
    state: State = "fail" if wanted == name else "note"
    found = f"{version} is for {', '.join(targets)}, and this GPU is {gpu.target}"
    return Finding(f"backend {name}", state, found, "give --backend tensorrt")


def _library(name: str, packages: tuple[str, ...], extra: str | None, wanted: str) -> Finding:
    if (version := _version(*packages)) is not None:
        return Finding(f"backend {name}", "ok", f"{packages[0]} {version}")
    command = f"pip install {packages[0]}" if extra is None else command_for_extra(extra)
    state: State = "fail" if wanted == name else "note"
    return Finding(f"backend {name}", state, f"{packages[0]} is not installed", f"run: {command}")


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def existing(folder: Path) -> Path:
    """The nearest folder above `folder`, or itself, that exists."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.is_dir())
