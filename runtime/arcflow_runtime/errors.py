"""The runtime's exception classes. Each message says what must be, what was found and what to do next."""


class ArcFlowError(Exception):
    """Base class of every error raised on purpose; the command line prints it without a traceback."""


class BundleError(ArcFlowError):
    """A bundle is missing, damaged, of an unsupported version, or lacks something that it must contain."""


class RequestError(ArcFlowError, ValueError):
    """An argument of a request or command is invalid; nothing was run."""


class EngineError(ArcFlowError):
    """An engine cannot be found, built or loaded, or it failed while running."""


class SourceError(ArcFlowError):
    """A checkpoint, LoRA or bundle on the hub is missing, unreachable or damaged, or does not fit the student."""


class LoraError(ArcFlowError):
    """A LoRA file is damaged, not a LoRA or for another model, or holds something that is not supported."""
