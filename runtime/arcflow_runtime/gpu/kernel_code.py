"""The CUDA kernels' source, and their code for one GPU: from a fatbin, from a cache, or compiled by NVRTC.

The source is in `runtime/kernels/`, and in this package once installed. `runtime/kernels/build.py` may leave a fatbin
there; it is used if it was made from exactly this source and holds code for this GPU. Otherwise NVRTC compiles the
source, once per machine, and the result is cached. Used by `kernels.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from arcflow_runtime.errors import EngineError

_log = logging.getLogger("arcflow")

_DIGEST_BYTES = 32
#: The file that includes all others.
MAIN = "noise.cu"
_INCLUDE = re.compile(r'^#include "(.*)"\n', re.MULTILINE)


def kernels_folder() -> Path:
    """The folder of the kernels' source: beside this package in a checkout, inside it when installed.

    Raises:
        EngineError: the source is missing from the installation.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "update.cu").is_file():
            return folder
    raise EngineError(f"{package / 'kernels'} with the kernels' source is missing; install arcflow again")


def source() -> str:
    """The kernels as one text for NVRTC: each file that `MAIN` includes, once, before the file that includes it."""
    folder, seen = kernels_folder(), set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8")
        return "".join(map(expand, _INCLUDE.findall(text))) + _INCLUDE.sub("", text)

    return expand(MAIN)


def find_fatbin(arch: str) -> bytes | None:
    """The fatbin's bytes if it was made from this source and holds code for `arch`, such as "89"; else None."""
    folder = kernels_folder()
    try:
        about = json.loads((folder / "arcflow.fatbin.json").read_bytes())
        fatbin = (folder / "arcflow.fatbin").read_bytes()
    except (OSError, ValueError):
        return None
    made = (about.get("source_sha256"), about.get("sha256")) if isinstance(about, dict) else None
    if made != (hashlib.sha256(source().encode()).hexdigest(), hashlib.sha256(fatbin).hexdigest()):
        _log.warning("%s was made from another source; make it again with build.py", folder / "arcflow.fatbin")
        return None
    return fatbin if arch in about["architectures"] else None


def compile_code(arch: str) -> tuple[str, bytes]:
    """Compile the kernels with NVRTC, which needs no driver.

    Args:
        arch: compute capability of the GPU, such as "89".

    Returns:
        ("cubin", machine code), or ("ptx", PTX for the driver to compile) if the GPU is newer than NVRTC.

    Raises:
        EngineError: NVRTC is not installed or fails, or the GPU is too old for it.
    """
    from cuda.core import Program, ProgramOptions

    known = [n for n in nvrtc_architectures() if n <= int(arch)]
    if not known:
        raise EngineError(f"NVRTC has no architecture up to compute capability {arch}; use a GPU of 7.5 or newer")
    kind, prefix = ("cubin", "sm") if known[-1] == int(arch) else ("ptx", "compute")
    options = ProgramOptions(name="arcflow.cu", arch=f"{prefix}_{known[-1]}", std="c++17")
    try:
        program = Program(source(), "c++", options)
        code = program.compile(kind).code
    except Exception as e:  # cuda.core's errors share no public base
        raise EngineError(f"NVRTC cannot compile the kernels for {prefix}_{known[-1]}: {e}") from e
    return kind, bytes(code)


def nvrtc_architectures() -> list[int]:
    """The compute capabilities that NVRTC compiles for, in ascending order.

    Raises:
        EngineError: NVRTC is not installed.
    """
    from cuda.bindings import nvrtc

    try:
        error, archs = nvrtc.nvrtcGetSupportedArchs()
    except Exception as e:  # the loader's errors differ between versions
        raise EngineError(
            "NVRTC, which compiles the CUDA kernels, cannot be loaded; run: pip install nvidia-cuda-nvrtc "
            f"({str(e).partition(chr(10))[0]})"
        ) from e
    if error:
        raise EngineError(f"NVRTC cannot list its architectures ({error}); install nvidia-cuda-nvrtc again")
    return sorted(int(n) for n in archs)


def cached_code(arch: str, folder: Path) -> tuple[str, bytes]:
    """The result of `compile_code`, cached in `folder`. A damaged or read-only cache costs only time.

    The key is a hash of the source, NVRTC's version and `arch`. A file starts with the SHA-256 of the code after it.
    """
    from cuda.bindings import nvrtc

    nvrtc_architectures()  # raises an error that says what to do if NVRTC is missing
    version = ".".join(str(n) for n in nvrtc.nvrtcVersion()[1:])
    key = hashlib.sha256(f"{version}\n{arch}\n{source()}".encode()).hexdigest()[:32]
    for kind in ("cubin", "ptx"):
        with suppress(OSError):
            data = (folder / f"kernels-{key}.{kind}").read_bytes()
            digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if hashlib.sha256(code).digest() == digest:
                return kind, code
    kind, code = compile_code(arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="kernels-", suffix=".partial", delete=False) as f:
            f.write(hashlib.sha256(code).digest() + code)
        os.replace(f.name, folder / f"kernels-{key}.{kind}")
    except OSError as e:
        _log.warning("the compiled kernels cannot be kept in %s: %s", folder, e.strerror)
    return kind, code


def cache_folder() -> Path:
    """The user's cache folder for compiled kernels; the environment variable `ARCFLOW_CACHE` names another."""
    if named := os.environ.get("ARCFLOW_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arcflow"
