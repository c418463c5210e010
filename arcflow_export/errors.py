"""The exceptions that the exporter, calibration and distillation raise for bad input or a failed stage."""

from arcflow_runtime.errors import ArcFlowError, SourceError

__all__ = ["CalibrationError", "ExportError", "QuantizeError", "SourceError"]


class ExportError(ArcFlowError):
    """A stage of the export failed; the message names the stage and the part."""


class QuantizeError(ArcFlowError):
    """A bundle cannot be quantised; the message names what is wrong: the policy, the scales or the bundle."""


class CalibrationError(ArcFlowError):
    """A calibration cannot start or continue, or a scales file is damaged or belongs to another student."""
