"""The exceptions of distillation and evaluation."""

from arcflow_runtime.errors import ArcFlowError, RequestError


class ConfigError(RequestError):
    """A preset or configuration is missing, malformed or out of range; nothing has been run."""


class DistillError(ArcFlowError):
    """A distillation or evaluation cannot start or continue."""
