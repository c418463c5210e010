"""The service's exception: everything that a reply to a failed request needs, in OpenAI's shape."""

from __future__ import annotations

from arcflow_runtime.errors import ArcFlowError

BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TIMED_OUT, TOO_LARGE, BAD_MEDIA_TYPE = 400, 401, 404, 408, 413, 415
TOO_MANY, FAILED, UNAVAILABLE = 429, 500, 503

#: What ONNX Runtime and OpenVINO say, which have no exception of their own for it.
_OUT_OF_MEMORY = ("out of memory", "failed to allocate", "cannot allocate")
#: HTTP status -> OpenAI's `type` of an error.
_TYPES = {
    UNAUTHORIZED: "authentication_error",
    TOO_MANY: "rate_limit_error",
    FAILED: "server_error",
    UNAVAILABLE: "server_error",
}


class ServiceError(ArcFlowError):
    """A request cannot be answered with an image.

    Attributes:
        status: the HTTP status.
        code: a word for programs, such as "queue_full".
        param: the field of the request that is wrong, or None.
        retry_after_s: when the client should try again, or None.
        retry: False if the same request would fail again, although its status says that it may be repeated.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after_s, self.retry = retry_after_s, retry

    def __reduce__(self) -> tuple[type[ServiceError], tuple[object, ...]]:
        """Pass every argument on, where an exception's default is the message alone."""
        return type(self), (self.status, self.code, str(self), self.param, self.retry_after_s, self.retry)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The reply as OpenAI words it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that tell OpenAI's client whether and when to try again."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if not self.retry:
            headers["x-should-retry"] = "false"
        return headers


def is_out_of_memory(error: BaseException) -> bool:
    """True if an engine failed because memory of this machine or of its GPU ran out."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def queue_is_full(limit: int, retry_after_s: int) -> ServiceError:
    """There is no room for a request; `limit` is the number of images that may wait."""
    message = f"{limit} images may wait at most, and there is no room for this request; try again later"
    return ServiceError(TOO_MANY, "queue_full", message, retry_after_s=retry_after_s)


def waited_too_long(deadline_s: float, retry_after_s: int) -> ServiceError:
    """A request was not started in time."""
    message = f"the request waited for {deadline_s:g} s without being started; try again later"
    return ServiceError(UNAVAILABLE, "deadline_exceeded", message, retry_after_s=retry_after_s)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ServiceError:
    """An error for a request that must be changed before it is sent again."""
    return ServiceError(BAD_REQUEST, code, message, param)
