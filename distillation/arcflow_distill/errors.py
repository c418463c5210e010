"""The typed exceptions of distillation; each message names the thing, what was expected and what to do."""

from arcflow_runtime.errors import ArcFlowError, RequestError


class ConfigError(RequestError):
    """A preset or configuration is missing, malformed or out of range; nothing was run."""


class DistillError(ArcFlowError):
    """A distillation cannot start or go on."""
