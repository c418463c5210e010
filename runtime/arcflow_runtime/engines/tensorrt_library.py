"""Facts about TensorRT and TensorRT-RTX: backend name -> Python module, version and GPU targets.

Their Python APIs are nearly the same, so the builder (`build/`) and the engines on the GPU (`gpu/tensorrt.py`) treat
both alike, with a `Library` as parameter.
"""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass
from types import ModuleType

from arcflow_runtime.engines.gpus import Gpu
from arcflow_runtime.errors import EngineError, RequestError


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's two inference libraries.

    `module` is its Python module, `package` the pip requirement, `major` the supported major version. `targets` are the
    compute capabilities that it builds for without a GPU; empty if it builds only for the GPU that it runs on. `flags`
    are the builder flags and preview features that every engine is built with.
    """

    name: str
    module: str
    package: str
    major: int
    targets: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def ahead_of_time(self) -> bool:
        """True if the library builds engines without the target GPU."""
        return bool(self.targets)

    def load(self) -> ModuleType:
        """Import the library.

        Raises:
            EngineError: it is not installed, cannot be loaded, or has an unsupported version.
        """
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError:
            raise EngineError(f"{self.name} is not installed; run: pip install '{self.package}'") from None
        except (ImportError, OSError) as e:
            raise EngineError(f"{self.name} is installed but cannot be loaded: {e}; install it again") from e
        if module.__version__.split(".")[0] != str(self.major):
            raise EngineError(
                f"{self.name} must be version {self.major}, got {module.__version__}; run: pip install '{self.package}'"
            )
        return module

    def key_gpu(self, gpu: Gpu | None) -> str | None:
        """The `gpu` of an engine's key: the product name if the library builds for the GPU it runs on, else None."""
        return None if self.ahead_of_time or gpu is None else gpu.name

    def check_target(self, target: str) -> str:
        """Check that the library can build for `target`, such as "sm89", without a GPU, and return it.

        Raises:
            RequestError: it cannot.
        """
        if target not in self.targets:
            raise RequestError(f"--target must be among {', '.join(self.targets)} for {self.name}, got {target!r}")
        return target


#: REQUIRE_USER_ALLOCATION: no engine allocates memory when it runs, which would keep it out of a CUDA graph. It takes
#: its scratch memory from the caller instead, or is not built. Only TensorRT-RTX has the flag.
#: RUNTIME_ACTIVATION_RESIZE_10_10: an engine wants the scratch memory of the shapes at hand, in place of that of its
#: largest. It is off by default in TensorRT and on in TensorRT-RTX.
LIBRARIES = {
    "tensorrt": Library("tensorrt", "tensorrt", "tensorrt>=11,<12", 11, (), ("RUNTIME_ACTIVATION_RESIZE_10_10",)),
    "tensorrt-rtx": Library(
        "tensorrt-rtx",
        "tensorrt_rtx",
        "tensorrt-rtx>=1.7,<1.8",
        1,
        ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        ("REQUIRE_USER_ALLOCATION",),
    ),
}


def this_platform() -> str:
    """Operating system and processor, such as "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()
