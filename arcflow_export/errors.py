"""The typed exceptions of the exporter."""

from arcflow_runtime.errors import ArcFlowError


class SourceError(ArcFlowError):
    """A checkpoint, adapter or LoRA is missing, unreachable, damaged or not what it should be."""


class ExportError(ArcFlowError):
    """A stage of the export failed; the message names the stage and the part."""


class QuantizeError(ArcFlowError):
    """A bundle cannot be quantised: its policy, its scales or the bundle itself does not fit; the message names it."""


class CalibrationError(ArcFlowError):
    """A calibration cannot start or go on, or a file of scales is damaged or of another student."""
