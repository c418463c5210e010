"""Check the arguments of a pipeline's call against the bundle, before anything runs: arguments -> `Request`."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.disk.manifest import Manifest, SizeRange
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.errors import RequestError
from arcflow_runtime.generate.diffusers_arguments import OUTPUT_TYPES, embeddings_of, latents_of, one_of, seed_of
from arcflow_runtime.generate.guidance import check_guidance
from arcflow_runtime.maths.noise import MAX_SEED, MIN_SEED

OutputType = Literal["pil", "numpy", "latents"]
_OUTPUT_TYPES = get_args(OutputType)

DEFAULT_SIZE_PX = 1024
MAX_INFERENCE_STEPS = 1000
MAX_GUIDANCE_SCALE = 65.0
MAX_LORA_SCALE = 1e6
#: More than this many times the student's own number of steps is warned of.
FAR_STEPS = 2
#: Of a number in a message.
_SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Request:
    """Checked arguments. A batch has len(prompts) * num_images_per_prompt images, in the order of the prompts.

    Either `seed` is set or the caller's noise, `latents` [B, N, C] float32. If the caller gives `embeddings`, they are
    by prompt, and `prompts` holds made-up names for them. `loras` are names with scales other than 0, sorted.
    `negative_prompts` are one per prompt, with the scale of the guidance `true_cfg_scale`; None does not guide.
    """

    prompts: tuple[str, ...]
    num_images_per_prompt: int
    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float | None
    seed: int | tuple[int, ...] | None
    max_sequence_length: int
    output_type: OutputType
    warnings: tuple[str, ...]
    latents: np.ndarray | None = None
    embeddings: Mapping[str, Embeddings] | None = None
    loras: tuple[tuple[str, float], ...] = ()
    negative_prompts: tuple[str, ...] | None = None
    true_cfg_scale: float = 1.0

    @property
    def batch(self) -> int:
        """Number of images B."""
        return len(self.prompts) * self.num_images_per_prompt


def check_request(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    height: int | None,
    width: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int,
    max_sequence_length: int | None,
    output_type: str,
    *,
    generator: object = None,
    latents: object = None,
    prompt_embeds: object = None,
    pooled_prompt_embeds: object = None,
    loras: object = None,
    negative_prompt: object = None,
    true_cfg_scale: object = None,
) -> Request:
    """Check every argument and fill in the bundle's defaults; see `Pipeline.__call__` for the arguments.

    Raises:
        RequestError: an argument has the wrong type or is out of the bundle's range.
    """
    one_of({"seed": seed, "generator": generator, "latents": latents}, "each of them decides the noise")
    one_of({"prompt": prompt, "prompt_embeds": prompt_embeds}, "each of them is the text")
    embeddings = None
    if prompt_embeds is not None or pooled_prompt_embeds is not None:
        if prompt_embeds is None:
            raise RequestError("pooled_prompt_embeds must be given with prompt_embeds, in place of a prompt")
        given = embeddings_of(manifest, prompt_embeds, pooled_prompt_embeds)
        embeddings = {f"prompt_embeds[{i}]": e for i, e in enumerate(given)}
    prompts = _prompts(prompt) if embeddings is None else tuple(embeddings)
    images_each = _integer("num_images_per_prompt", num_images_per_prompt, 1, None)
    batch = len(prompts) * images_each
    _check_batch(manifest.ranges.batch, len(prompts), images_each)
    steps = _steps(num_inference_steps, manifest)
    guidance = _guidance(guidance_scale)
    negatives, true_cfg, unguided = check_guidance(manifest, len(prompts), negative_prompt, true_cfg_scale)
    for text in negatives or ():
        _check_text("negative_prompt", text)
    warnings = list(unguided)
    if steps == 1:
        warnings.append("num_inference_steps 1 gives a blurry image; use 2 or more")
    if manifest.sampler == "momentum" and steps > FAR_STEPS * (own := manifest.schedule.num_inference_steps):
        warnings.append(
            f"num_inference_steps {steps} is more than {FAR_STEPS} times the {own} that this student was made for; "
            f"more steps may not improve the image, use {own}"
        )
    if guidance_scale is not None and not manifest.guidance:
        warnings.append(f"this student takes no guidance; guidance_scale {guidance_scale!r} was ignored")
    height_px = _size("height", height, manifest.ranges.height_px, manifest)
    width_px = _size("width", width, manifest.ranges.width_px, manifest)
    if latents is not None:
        space = manifest.latents
        tokens = height_px * width_px // (space.vae_scale_factor * space.patch_size) ** 2
        latents = latents_of(latents, (batch, tokens, space.channels * space.patch_size**2))
    return Request(
        prompts=prompts,
        num_images_per_prompt=images_each,
        height_px=height_px,
        width_px=width_px,
        num_inference_steps=steps,
        guidance_scale=guidance if manifest.guidance else None,
        seed=None if latents is not None else _seed(seed if generator is None else seed_of(generator), batch),
        max_sequence_length=_max_sequence_length(max_sequence_length, manifest),
        output_type=_output_type(output_type),
        warnings=tuple(warnings),
        latents=latents,
        embeddings=embeddings,
        loras=_loras(loras),
        negative_prompts=negatives,
        true_cfg_scale=true_cfg,
    )


def _loras(value: object) -> tuple[tuple[str, float], ...]:
    """Names and scales, sorted, so that requests with the same LoRAs are equal; a scale of 0 is no LoRA."""
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise RequestError(f'loras must be names with scales such as {{"ink": 0.8}}, got {value!r}')
    scales = {name: _lora_scale(name, scale) for name, scale in value.items()}
    return tuple(sorted((name, scale) for name, scale in scales.items() if scale != 0))


def _lora_scale(name: str, value: Any) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        scale = float(value)
    except OverflowError:  # an integer with more digits than a float has room for
        scale = math.inf
    except (TypeError, ValueError):
        raise RequestError(f"loras: the scale of {name!r} must be a number, got {value!r}") from None
    if not abs(scale) <= MAX_LORA_SCALE:
        shown = repr(value)[:_SHOWN_CHARACTERS]
        raise RequestError(f"loras: the scale of {name!r} must be at most {MAX_LORA_SCALE:g} in size, got {shown}")
    return scale


def _prompts(prompt: object) -> tuple[str, ...]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise RequestError(f"prompt must be a string or a list of strings, got {prompt!r}")
    if not prompts:
        raise RequestError("prompt must hold at least one string, got an empty list; '' is allowed as a prompt")
    for p in prompts:
        _check_text("prompt", p)
    return tuple(prompts)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            f"{name} must be valid Unicode, got a lone surrogate at position {e.start}; decode the text as UTF-8"
        ) from None


def _integer(name: str, value: object, low: int, high: int | None) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name} must be an integer, got {value!r}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {bounds}, got {number}")
    return number


def _check_batch(allowed: SizeRange, prompts: int, images_each: int) -> None:
    batch = prompts * images_each
    if not allowed.min <= batch <= allowed.max:
        raise RequestError(
            f"prompts times num_images_per_prompt must be between {allowed.min} and {allowed.max} "
            f"for this bundle, got {prompts} * {images_each} = {batch}; ask for fewer images at a time"
        )


def nearest_size(value: int | None, allowed: SizeRange) -> int:
    """The size in pixels nearest to `value` that the bundle allows; None is the default."""
    return min(max(DEFAULT_SIZE_PX if value is None else value, allowed.min), allowed.max)


def _size(name: str, value: int | None, allowed: SizeRange, manifest: Manifest) -> int:
    if value is None:
        return nearest_size(None, allowed)
    multiple = manifest.latents.vae_scale_factor * manifest.latents.patch_size
    size = _integer(name, value, 1, None)
    if size % multiple:
        nearest = max(round(size / multiple), 1) * multiple
        raise RequestError(f"{name} must be a multiple of {multiple}, got {size}; the nearest is {nearest}")
    if not allowed.min <= size <= allowed.max:
        raise RequestError(
            f"{name} must be between {allowed.min} and {allowed.max} for this bundle, got {size}; "
            "export a bundle with a wider range or choose another size"
        )
    return size


def _steps(value: int | None, manifest: Manifest) -> int:
    if value is None:
        return manifest.schedule.num_inference_steps
    steps = _integer("num_inference_steps", value, 1, MAX_INFERENCE_STEPS)
    if (own := manifest.schedule.sigmas) is not None and steps != len(own):
        raise RequestError(
            f"num_inference_steps must be {len(own)}, the number of sigmas in this bundle's schedule, got {steps}; "
            "export without --sigmas for other step counts"
        )
    baked = manifest.modulation.num_inference_steps if manifest.modulation is not None else ()
    if steps not in baked and "conditioner" not in manifest.parts:
        raise RequestError(
            f"num_inference_steps must be one of those baked into this bundle, {list(baked)}, got {steps}; "
            f"export with --steps {steps}, or with --keep-conditioner for any step count"
        )
    return steps


def _guidance(value: float | None) -> float:
    if value is None:
        return DEFAULT_GUIDANCE_SCALE
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        scale = float(value)
    except (TypeError, ValueError):
        raise RequestError(f"guidance_scale must be a number, got {value!r}") from None
    if not math.isfinite(scale) or not 0 <= scale <= MAX_GUIDANCE_SCALE:
        raise RequestError(f"guidance_scale must be between 0 and {MAX_GUIDANCE_SCALE:g}, got {value!r}")
    return scale


def _seed(value: int | Sequence[int] | None, batch: int) -> int | tuple[int, ...]:
    if value is None:
        seeds = tuple(secrets.randbits(32) for _ in range(batch))
        return seeds if batch > 1 else seeds[0]
    if not isinstance(value, (list, tuple)):
        try:
            return _integer("seed", value, MIN_SEED, MAX_SEED)
        except RequestError as e:
            raise RequestError(f"{e}; give an integer, or a list of one per image") from None
    if len(value) != batch:
        raise RequestError(f"seed must be an integer or a list of {batch}, one per image, got a list of {len(value)}")
    return tuple(_integer(f"seed[{i}]", s, MIN_SEED, MAX_SEED) for i, s in enumerate(value))


def _max_sequence_length(value: int | None, manifest: Manifest) -> int:
    limit = manifest.text.max_sequence_length
    return limit if value is None else _integer("max_sequence_length", value, 1, limit)


def _output_type(value: str) -> OutputType:
    value = OUTPUT_TYPES.get(value, value) if isinstance(value, str) else value
    if value not in _OUTPUT_TYPES:
        raise RequestError(f"output_type must be one of {list(_OUTPUT_TYPES)}, got {value!r}")
    return value  # type: ignore[return-value]
