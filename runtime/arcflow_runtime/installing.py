"""Name the pip command that installs a missing module; used in error messages."""

from __future__ import annotations

from pathlib import Path

#: Third-party module -> the extra of this project (see pyproject.toml) that installs it.
_EXTRA_OF_MODULE = {
    "cuda": "gpu",
    "modelopt": "calibrate",
    "openvino": "openvino",
    "openvino_tokenizers": "openvino",
    "polygraphy": "tensorrt-rtx",
    "pydantic": "distill",
    "tensorrt_rtx": "tensorrt-rtx",
}
#: Package of this project that needs more than the runtime -> its extra.
_EXTRA_OF_PACKAGE = {
    "arcflow_runtime.hub": "hub",
    "arcflow_export": "export",
    "arcflow_calibration": "calibrate",
    "arcflow_distill": "distill",
    "arcflow_serve": "serve",
}
_CHECKOUT = Path(__file__).resolve().parents[2]


def install_command(package: str, module: str = "") -> str:
    """The pip command that installs what `package` needs.

    Args:
        package: a package of this project, such as "arcflow_export".
        module: the module whose import failed. If it has an extra of its own, that extra is named, not the package's.

    Returns:
        A pip command. It names the checkout's path if this code runs from a checkout.
    """
    return command_for_extra(_EXTRA_OF_MODULE.get(module.partition(".")[0]) or _EXTRA_OF_PACKAGE.get(package, ""))


def command_for_extra(extra: str) -> str:
    """The pip command that installs this project with an extra; "" is the runtime alone."""
    wanted = f"[{extra}]" if extra else ""
    if (_CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e '{_CHECKOUT}{wanted}'"
    return f"pip install 'arcflow{wanted}'"
