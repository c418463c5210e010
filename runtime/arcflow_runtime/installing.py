"""What to run for a package that is missing: a module's name -> a pip command."""

from __future__ import annotations

from pathlib import Path

#: The extra of this project that installs a module; see pyproject.toml.
_EXTRA_OF_MODULE = {
    "cuda": "gpu",
    "modelopt": "calibrate",
    "openvino": "openvino",
    "openvino_tokenizers": "openvino",
    "polygraphy": "tensorrt-rtx",
    "pydantic": "distill",
    "tensorrt_rtx": "tensorrt-rtx",
}
#: The extra of a package of this project, whose modules need more than the runtime.
_EXTRA_OF_PACKAGE = {"arcflow_export": "export", "arcflow_calibration": "calibrate", "arcflow_distill": "distill"}
_CHECKOUT = Path(__file__).resolve().parents[2]


def install_command(package: str, module: str = "") -> str:
    """The command that installs what `package` of this project lacks.

    Args:
        package: such as "arcflow_export".
        module: the module that was not found; its own extra, where it has one, goes before the package's.

    Returns:
        A pip command, with the path of the checkout where this code runs from one.
    """
    extra = _EXTRA_OF_MODULE.get(module.partition(".")[0]) or _EXTRA_OF_PACKAGE.get(package)
    wanted = f"[{extra}]" if extra else ""
    if (_CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e '{_CHECKOUT}{wanted}'"
    return f"pip install 'arcflow{wanted}'"
