"""The typed exceptions of the runtime; each message names the thing, what was expected and what to do."""


class ArcFlowError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""


class BundleError(ArcFlowError):
    """A bundle is missing, damaged, of another version, or does not hold what was asked of it."""


class RequestError(ArcFlowError, ValueError):
    """A request's argument is out of range; nothing was run."""


class EngineError(ArcFlowError):
    """An engine cannot run a graph, or failed while running it."""
