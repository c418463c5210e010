"""Build the CUDA driver made of host memory: cuda.h and the sources beside this file -> a folder with libcuda.so.1.

To build it without pytest: `python tests/host_cuda/build.py FOLDER`. Programs started with `LD_LIBRARY_PATH=FOLDER`
load this driver. With `--check` in place of the folder, nothing is built, and the exit code says whether it can be.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAME = "libcuda.so.1"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
#: The compiler must not fuse operations that the kernels' source keeps apart.
_EXACT = "-ffp-contract=off"
_WHEEL = "nvidia-cuda-runtime"


class CannotBuildError(Exception):
    """There is no compiler or no cuda.h; the message says what to install."""


def find_header() -> Path:
    """Find cuda.h of CUDA 13 in the nvidia-cuda-runtime wheel or in the CUDA toolkit.

    Raises:
        CannotBuildError: there is none.
    """
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    places = [Path(str(f.locate())) for f in files if f.name == "cuda.h"]
    places.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include" / "cuda.h")
    for place in places:
        if place.is_file() and "#define CUDA_VERSION 13" in place.read_text(encoding="utf-8"):
            return place
    raise CannotBuildError(f"cuda.h of CUDA 13 is missing; run: pip install '{_WHEEL}>=13,<14'")


def find_compiler() -> str:
    """Find a C++ compiler.

    Raises:
        CannotBuildError: there is none.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CannotBuildError("a C++ compiler is missing; run: apt-get install g++")
    return compiler


def error_table(header: str) -> str:
    """Generate the C++ table NAMES: the code, name and text of every CUresult in cuda.h."""
    found = re.search(r"typedef enum cudaError_enum \{(.*?)\} CUresult;", header, re.DOTALL)
    assert found is not None, "cuda.h has another form"
    names = re.findall(r"^\s+(CUDA_\w+)\s*=", found[1], re.MULTILINE)
    rows = [f'    {{{n}, "{n}", "{re.sub("^CUDA_(ERROR_)?", "", n).replace("_", " ").lower()}"}},\n' for n in names]
    kind = "struct ErrorName {\n    CUresult error;\n    const char *name, *text;\n};\n"
    return f"{kind}constexpr ErrorName NAMES[] = {{\n{''.join(rows)}}};\n"


def build(folder: Path) -> Path:
    """Build into `folder`. Does nothing if `folder` has a build from the same files.

    Returns:
        The path of the library.

    Raises:
        CannotBuildError: there is no compiler or no cuda.h.
        subprocess.CalledProcessError: the compiler fails.
    """
    compiler, header = find_compiler(), find_header()
    kernels = ROOT / "runtime" / "kernels"
    sources = [*sorted(HERE.glob("*.cpp")), HERE.parent / "kernel_host.cpp"]
    used = [*sources, *sorted(HERE.glob("*.h")), *sorted(kernels.glob("*.[ch]*")), HERE / "exports.map", header]
    key = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in used)).hexdigest()
    library, stamp = folder / NAME, folder / "built-from"
    if library.is_file() and stamp.is_file() and stamp.read_text() == key:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "errors.inc").write_text(error_table(header.read_text(encoding="utf-8")))
    places = [f"-I{p}" for p in (HERE, folder, header.parent, kernels)]
    linking = [f"-Wl,-soname,{NAME}", f"-Wl,--version-script={HERE / 'exports.map'}", "-ldl"]
    command = [compiler, *_FLAGS, _EXACT, *places, *map(str, sources), "-o", str(library), *linking]
    subprocess.run(command, check=True)
    stamp.write_text(key)
    return library


def host_driver(once: Callable[[str, Callable[[Path], Path]], Path]) -> Path:
    """The folder of the driver for pytest: that of the C++ library's tests in ARCFLOW_CPP_BUILD, or one of this run.

    Raises:
        CannotBuildError: see `build`.
    """
    named = os.environ.get("ARCFLOW_CPP_BUILD")
    shared = Path(named).absolute() / "tests" / "host_cuda" if named else None
    folder = once("driver of host memory", lambda folder: build(shared or folder))
    return shared or folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER|--check")
    try:
        print(find_compiler() and find_header() if sys.argv[1] == "--check" else build(Path(sys.argv[1])))
    except CannotBuildError as e:
        sys.exit(str(e))
