"""The typed exceptions of calibration; each message names the thing, what was expected and what to do."""

from arcflow_runtime.errors import ArcFlowError


class CalibrationError(ArcFlowError):
    """A calibration cannot start or go on, or a file of scales is damaged or of another student."""
