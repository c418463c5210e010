"""Check a parsed request against the service's limits and the bundle: `GenerationRequest` -> a job and its answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping

from arcflow_runtime.errors import RequestError
from arcflow_runtime.generate.request import Request
from arcflow_runtime.maths.noise import MAX_SEED
from arcflow_serve.encode_image import Encoding
from arcflow_serve.errors import NOT_FOUND, ServiceError, bad_request
from arcflow_serve.jobs import BatchKey, Event, Job
from arcflow_serve.models import Model
from arcflow_serve.replies import Answer
from arcflow_serve.schema import GenerationRequest
from arcflow_serve.settings import Settings


def accept(
    models: Mapping[str, Model],
    limits: Settings,
    asked: GenerationRequest,
    client: str,
    deliver: Callable[[Event], None],
) -> Answer:
    """Check a request against the limits and its model, and make a job of it, which is not submitted yet.

    Args:
        models: by name, the default first.
        limits: of the service.
        asked: the parsed body.
        client: whose turn the job takes.
        deliver: receives the job's events.

    Raises:
        ServiceError: a field is wrong; it is named.
    """
    model = find_model(models, asked.model)
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            raise bad_request(f"{name} must have at most {limits.max_prompt_chars} characters, got {len(text)}", name)
    n = 1 if asked.n is None else asked.n
    if n > limits.max_n:
        raise bad_request(f"n must be at most {limits.max_n}, got {n}", "n")
    steps = asked.num_inference_steps
    if steps is not None and steps > limits.max_steps:
        raise bad_request(f"num_inference_steps must be at most {limits.max_steps}, got {steps}", "num_inference_steps")
    if asked.seed is not None and asked.seed + n - 1 > MAX_SEED:
        raise bad_request(f"seed must leave room for {n} images below 2**64, got {asked.seed}", "seed")
    if asked.background == "transparent":
        raise bad_request("background must be 'opaque' or 'auto': images have no alpha channel", "background")
    if asked.partial_images and not asked.stream:
        raise bad_request("partial_images must be given together with stream=true", "partial_images")
    encoding = _encoding(asked)
    request = _checked(model, asked)
    if request.num_inference_steps > limits.max_steps:
        raise bad_request(
            f"num_inference_steps must be given, at most {limits.max_steps}: "
            f"the bundle's own {request.num_inference_steps} are more than this service allows",
            "num_inference_steps",
        )
    size = max(request.height_px, request.width_px)
    if limits.max_px is not None and size > limits.max_px:
        raise bad_request(f"size must be at most {limits.max_px} pixels on each side, got {size}", "size")
    key = BatchKey(
        model.name,
        request.height_px,
        request.width_px,
        request.num_inference_steps,
        request.guidance_scale,
        min(asked.partial_images or 0, request.num_inference_steps - 1),
        request.loras,
        None if request.negative_prompts is None else request.true_cfg_scale,
    )
    negative = None if request.negative_prompts is None else request.negative_prompts[0]
    job = Job(
        client=client,
        key=key,
        prompt=asked.prompt,
        seeds=tuple(secrets.randbits(32) if asked.seed is None else asked.seed + i for i in range(n)),
        encoding=encoding,
        deadline=time.monotonic() + limits.deadline_s,
        deliver=deliver,
        negative_prompt=negative,
    )
    space = model.manifest.latents
    token_px = space.vae_scale_factor * space.patch_size
    image_tokens = request.height_px * request.width_px // token_px**2
    return Answer(asked, job, (*asked.ignored(), *request.warnings), model.tokens, image_tokens)


def find_model(models: Mapping[str, Model], name: str | None) -> Model:
    """The model called `name`, or the first.

    Raises:
        ServiceError: there is none of this name.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        names = ", ".join(repr(n) for n in models)
        shown = repr(name[:60])
        raise ServiceError(NOT_FOUND, "model_not_found", f"model must be one of {names}, got {shown}", "model")
    return models[name]


def _checked(model: Model, asked: GenerationRequest) -> Request:
    try:
        return model.check(
            asked.prompt,
            asked.size_px(),
            asked.num_inference_steps,
            asked.guidance_scale,
            asked.seed,
            asked.negative_prompt,
            asked.true_cfg_scale,
            asked.loras,
        )
    except RequestError as e:
        # The message begins with the name of the argument.
        name = str(e).split(" ", 1)[0].rstrip(":")
        param = "size" if name in ("height", "width") else name
        raise bad_request(str(e), param if param in GenerationRequest.model_fields else None) from None


def _encoding(asked: GenerationRequest) -> Encoding:
    name = asked.output_format or "png"
    quality = asked.output_compression
    if name == "png" and quality not in (None, 100):
        raise bad_request(
            f"output_compression must be 100 for png, which is lossless, got {quality}; or give output_format",
            "output_compression",
        )
    return Encoding(name, 100 if quality is None else quality)
