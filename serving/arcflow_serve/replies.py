"""Replies in the shape of OpenAI's images API: a checked request and its images -> JSON objects and events."""

from __future__ import annotations

import base64
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from pydantic_core import to_json
from starlette.responses import Response

from arcflow_serve.errors import FAILED, UNAUTHORIZED, ServiceError
from arcflow_serve.jobs import Finished, Job, Preview
from arcflow_serve.schema import GenerationRequest

_log = logging.getLogger("arcflow.serve")
#: A student has one quality, and OpenAI's reply must name one.
_QUALITY = "high"


@dataclass(frozen=True)
class Answer:
    """What a reply says beside its images; `tokens` is `Model.tokens`."""

    request: GenerationRequest
    job: Job
    warnings: tuple[str, ...]
    tokens: Callable[[str], tuple[int, tuple[str, ...]]]
    image_tokens: int

    def reply(self, finished: list[Finished]) -> bytes:
        """The whole reply, once every image is finished."""
        images = sorted(finished, key=lambda event: event.picture)
        whole = {"created": int(time.time()), "data": [self._image(event) for event in images]}
        return to_json(whole | self._facts() | self._about() | {"usage": self._usage(len(images))})

    def event(self, event: Preview | Finished, index: int) -> bytes:
        """A server-sent event; `index` counts the partial images of its image."""
        if isinstance(event, Preview):
            kind = "image_generation.partial_image"
            body = {"b64_json": _base64(event.image), "partial_image_index": index}
        else:
            kind = "image_generation.completed"
            body = self._image(event) | self._about() | {"usage": self._usage(1)}
        whole = {"type": kind, "created_at": int(time.time()), "image_index": event.picture} | body | self._facts()
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), to_json(whole))

    @cached_property
    def _text(self) -> tuple[int, list[str]]:
        """Number of text tokens, and warnings about prompts that were cut.

        First needed after an image is finished, when this process has tokenised the prompts to generate it.
        """
        counted = [self.tokens(text) for text in (self.job.prompt, self.job.negative_prompt) if text is not None]
        return sum(tokens for tokens, _ in counted), [cut for _, cuts in counted for cut in cuts]

    def _image(self, event: Finished) -> dict[str, object]:
        encoded = _base64(event.image)
        name = "url" if self.request.response_format == "url" else "b64_json"
        value = f"data:image/{self.job.encoding.format};base64,{encoded}" if name == "url" else encoded
        waited_ms = ((self.job.started or self.job.arrived) - self.job.arrived) * 1e3
        timings = {"queue": waited_ms} | dict(event.timings_ms)
        return {
            name: value,
            "seed": self.job.seeds[event.picture],
            "batch_size": event.batch_size,
            "timings_ms": {stage: round(ms, 3) for stage, ms in timings.items()},
        }

    def _facts(self) -> dict[str, object]:
        key = self.job.key
        return {
            "size": f"{key.width_px}x{key.height_px}",
            "quality": _QUALITY,
            "output_format": self.job.encoding.format,
            "background": "opaque",
        }

    def _about(self) -> dict[str, object]:
        key, asked = self.job.key, self.request
        return {
            "model": key.model,
            "num_inference_steps": key.num_inference_steps,
            "guidance_scale": key.guidance_scale,
            "true_cfg_scale": key.true_cfg_scale,
            "warnings": [*self.warnings, *self._text[1]],
            "safety_identifier": asked.safety_identifier or asked.user or None,
        }

    def _usage(self, images: int) -> dict[str, object]:
        text, output = self._text[0], self.image_tokens * images
        return {
            "input_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"image_tokens": output, "text_tokens": 0},
            "total_tokens": text + output,
        }


def error_response(error: ServiceError) -> Response:
    """An error as OpenAI words it."""
    headers = error.headers() | ({"www-authenticate": "Bearer"} if error.status == UNAUTHORIZED else {})
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


def unexpected(error: Exception, request_id: str) -> Response:
    """The answer after an error of the service's own code, which is logged."""
    _log.error("request %s failed", request_id, exc_info=error)
    message = "the service failed; the log of the service says more"
    return error_response(ServiceError(FAILED, "internal_error", message, retry=False))


def new_request_id() -> bytes:
    """A value for the header x-request-id."""
    return b"req_" + secrets.token_hex(12).encode()


def error_event(body: dict[str, dict[str, str | None]]) -> bytes:
    """An error after the first event; OpenAI's client raises it."""
    return b"event: error\ndata: %s\n\n" % json.dumps(body).encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
