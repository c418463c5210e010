"""Shared by tests/test_cpp*.py: building the C++ library, its Python binding, and helpers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import Tokenizer

from arcflow_runtime.disk.bundle import Bundle

CPP = Path(__file__).parent.parent / "runtime" / "cpp"
REQUEST_ERROR, BUNDLE_ERROR, ENGINE_ERROR, CLOSED = 1, 2, 3, 4
PROMPTS = ["a red circle", "an old sailor in a dark rainy street at night", ""]


def _embed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embed", CPP / "examples" / "embed.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: The example is the tests' binding, too.
embed = _embed()


def configure_cpp(folder: Path, *options: str) -> None:
    """Configure the C++ project, or skip the test if it cannot be built here."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs cmake and a C++ compiler")
    if importlib.util.find_spec("nlohmann_json") is None:
        pytest.skip("needs the package nlohmann-json")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    defaults = [f"-DARCFLOW_PYTHON={sys.executable}", "-DARCFLOW_WERROR=ON"]
    run(["cmake", "-S", CPP, "-B", folder, *generator, *defaults, *options])


def build_target(folder: Path, target: str, *options: str) -> None:
    """Build what is not up to date of one target; a new folder is configured with the options.

    Workers of pytest may share the folder: one builds, the others wait.
    """
    from filelock import FileLock

    with FileLock(f"{folder}.lock"):
        if not (folder / "CMakeCache.txt").exists():
            configure_cpp(folder, *options)
        run(["cmake", "--build", folder, "--parallel", os.cpu_count() or 1, "--target", target])


def build_library(folder: Path) -> None:
    """Build the library, its test programs and examples, or skip the test if they cannot be built here."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("needs the packages openvino and openvino-tokenizers")
    build_target(folder, "all", "-DARCFLOW_OPENVINO=ON")


def library_of(build: Path) -> Path:
    """The shared library in a build folder."""
    return next(p for name in ("libarcflow.so", "libarcflow.dylib") if (p := build / name).exists())


def run(command, **options) -> subprocess.CompletedProcess:
    """Run a program, which must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def ids_of(bundle: Path, prompt: str):
    """A prompt's token ids for `arcflow_tokens`: with special tokens, not padded."""
    manifest = Bundle.open(bundle).manifest
    tokenizers = [Tokenizer.from_file(str(bundle / file)) for _, file in sorted(manifest.tokenizers.items())]
    text = (manifest.text.template or "{}").replace("{}", prompt)
    ids = [t.encode(text).ids for t in tokenizers]
    return tuple(ids) if len(ids) == 2 else ids[0]


def close(ours: np.ndarray, reference: np.ndarray) -> None:
    """Assert the project's contract for latents: equal within 1e-4 of the largest value."""
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()
