"""The body of a request for images, as OpenAI's client sends it: JSON bytes -> `GenerationRequest`."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arcflow_serve.errors import ServiceError, bad_request
from arcflow_serve.settings import parse_size

MAX_PARTIAL_IMAGES = 3
_SHOWN_CHARACTERS = 60
#: Fields that other services and libraries have, and why there is none here.
_UNSUPPORTED = {
    "complexity": "a student has no planning stage",
    "frame_count": "only still images are generated",
    "frame_duration_ms": "only still images are generated",
    "svg": "only png, jpeg and webp are written",
    "width": "give size as WIDTHxHEIGHT",
    "height": "give size as WIDTHxHEIGHT",
    "steps": "the field is called num_inference_steps",
    "cfg_scale": "the field is called guidance_scale, or true_cfg_scale for guidance by a negative_prompt",
}


class GenerationRequest(BaseModel):
    """What to generate. Fields that are not listed are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title="ImageGenerationRequest")

    prompt: str = Field(description="The text to draw.")
    model: str | None = Field(None, description="A name of /v1/models; default: the first.")
    n: int | None = Field(
        None, ge=1, description="Number of images, at most the service's limit; each has its own seed. Default: 1."
    )
    size: str | None = Field(
        None,
        description='"WIDTHxHEIGHT" in pixels, both multiples of 16, or "auto". Default: 1024x1024 or the nearest.',
    )
    seed: int | None = Field(
        None,
        description="Seed of the first image; the others have the next integers. Default: random; the reply has it.",
    )
    num_inference_steps: int | None = Field(None, description="Network calls; default: the student's, usually 2.")
    guidance_scale: float | None = Field(None, description="For students of FLUX; default 3.5.")
    negative_prompt: str | None = Field(
        None,
        description="What to guide the images away from, for bundles of Qwen-Image itself; doubles the network calls.",
    )
    true_cfg_scale: float | None = Field(
        None, description="Scale of the guidance by negative_prompt; 1 or less does not guide. Default: the bundle's."
    )
    loras: dict[str, float] | None = Field(None, description="Scale of each LoRA by name, of those in /v1/models.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description='"url" gives a data: URL that holds the image. Default: b64_json.'
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="Default: png.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 0 to 100. Default: 100."
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        None, description='"transparent" is refused: images have no alpha channel.'
    )
    stream: bool | None = Field(None, description="True for server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="With stream: most partial images of each image, 0 to 3."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description="No effect: a student has one quality. num_inference_steps has an effect."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="No effect.")
    moderation: Literal["auto", "low"] | None = Field(None, description="No effect: nothing is filtered.")
    user: str | None = Field(None, description="No effect; the reply repeats it as safety_identifier.")
    safety_identifier: str | None = Field(None, description="No effect; the reply repeats it.")

    def size_px(self) -> tuple[int, int] | None:
        """Width and height in pixels; None for the default.

        Raises:
            ServiceError: `size` is not of the form WIDTHxHEIGHT.
        """
        if self.size is None or self.size == "auto":
            return None
        try:
            return parse_size(self.size)
        except ValueError:
            raise bad_request(
                f"size must be 'auto' or WIDTHxHEIGHT in pixels such as '1024x768', got {_shown(self.size)}", "size"
            ) from None

    def ignored(self) -> list[str]:
        """Warnings about fields that have no effect."""
        warnings = []
        if self.quality not in (None, "auto", "high", "standard"):
            warnings.append(f"quality {self.quality!r} has no effect: a student has one quality")
        if self.style is not None:
            warnings.append(f"style {self.style!r} has no effect; describe it in the prompt")
        return warnings


def parse_request(body: bytes) -> GenerationRequest:
    """Parse and check the body of a request.

    Raises:
        ServiceError: it is not JSON in UTF-8, or a field is unknown, missing or wrong.
    """
    try:
        return GenerationRequest.model_validate_json(body)
    except ValidationError as e:
        # The error's input may be the whole body, so only its beginning is shown.
        raise _explain(e.errors(include_url=False)[0]) from None


def _explain(error: Any) -> ServiceError:
    kind, where = error["type"], [str(x) for x in error["loc"]]
    if kind == "json_invalid":
        reason = error["ctx"]["error"]
        return bad_request(f"the body must be JSON in UTF-8: {reason}", code="invalid_json")
    if not where:
        return bad_request(f"the body must be a JSON object, got {_shown(error['input'])}", code="invalid_json")
    name = where[0]
    if kind == "extra_forbidden":
        return bad_request(_explain_unknown(name), name[:_SHOWN_CHARACTERS], "unknown_parameter")
    if kind == "missing":
        return bad_request(f"{name} must be given", name, "missing_required_parameter")
    path = ".".join(x[:_SHOWN_CHARACTERS] for x in where)
    message = error["msg"].replace("Input should be ", "")
    return bad_request(f"{path} must be {message}, got {_shown(error['input'])}", name)


def _explain_unknown(name: str) -> str:
    if name in _UNSUPPORTED:
        return f"{name} is not supported: {_UNSUPPORTED[name]}"
    close = difflib.get_close_matches(name[:_SHOWN_CHARACTERS], GenerationRequest.model_fields, 1)
    return f"unknown field {_shown(name)}" + (f"; did you mean {close[0]}?" if close else "; see /docs for the fields")


def _shown(value: object) -> str:
    """A value for a message, shortened. Only the first characters of a long text are looked at."""
    if isinstance(value, (str, bytes)):
        value = value[: _SHOWN_CHARACTERS + 1]
    elif isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value)} entries"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
