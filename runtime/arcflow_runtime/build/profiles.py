"""Make TensorRT optimisation profiles: a bundle's ranges and the requested sizes -> smallest, optimal, largest shapes.

A dimension is identified by its position in the table of rule B9, never by the name that the exporter gave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arcflow_runtime.disk.engine_record import Profile, ShapeRange
from arcflow_runtime.disk.families import facts
from arcflow_runtime.disk.manifest import LoraSlots, Manifest, SizeRange, TensorSpec
from arcflow_runtime.disk.signatures import signature
from arcflow_runtime.errors import BundleError, RequestError
from arcflow_runtime.generate.request import DEFAULT_SIZE_PX

#: Largest number of timesteps per run of a conditioner engine, unless the bundle's own schedule has more. Requests with
#: more steps take several runs.
MAX_STEPS = 8
#: Kernels of LoRA slots are tuned for this rank.
USUAL_RANK = 16


@dataclass(frozen=True)
class Size:
    """Inclusive ranges of an image's height and width in pixels; a single size is a range with min = max."""

    height_px: SizeRange
    width_px: SizeRange


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parse sizes such as "1024x1024,512-1536,768-1024x512": HEIGHTxWIDTH or one SIDE, each a number or a range.

    Raises:
        RequestError: an item has another form; the message names it.
    """
    sizes = []
    for item in text.split(","):
        sides = [_parse_range(side, "--resolutions", item) for side in item.split("x")]
        if len(sides) > 2:
            raise RequestError(f"--resolutions must be HEIGHTxWIDTH such as 1024x768, got {item!r}")
        sizes.append(Size(sides[0], sides[-1]))
    return tuple(dict.fromkeys(sizes))


def parse_batch(text: str) -> SizeRange:
    """Parse a batch size such as "2", or a range such as "1-4".

    Raises:
        RequestError: the text has another form.
    """
    return _parse_range(text, "--batch", text)


def default_size(manifest: Manifest) -> Size:
    """All sizes that the bundle allows up to 1024 pixels a side.

    An engine needs scratch memory for its largest shapes. That of FLUX's VAE decoder is 1.6 GB up to 1024 pixels and
    19.4 GB up to 2048 (docs/engines.md).
    """

    def up_to_default(allowed: SizeRange) -> SizeRange:
        return SizeRange(*_triple(allowed, DEFAULT_SIZE_PX)[:2])

    return Size(up_to_default(manifest.ranges.height_px), up_to_default(manifest.ranges.width_px))


def make_profiles(manifest: Manifest, part: str, sizes: tuple[Size, ...], batch: SizeRange) -> tuple[Profile, ...]:
    """The optimisation profiles of one part: one per size, without duplicates.

    Args:
        manifest: the bundle's; gives the inputs, the text length and the schedule.
        part: name of the part.
        sizes: image sizes in pixels; empty means `default_size`.
        batch: images per call.

    Raises:
        RequestError: a size or the batch is outside the range that the bundle was exported for.
        BundleError: the part has an input that rule B9 does not have.
    """
    _check_range("--batch", batch, manifest.ranges.batch, 1)
    profiles = []
    for size in sizes or (default_size(manifest),):
        _check_size(size, manifest)
        dims = _dimensions(manifest, part, size, batch)
        profile = {spec.name: _shapes(manifest, part, spec, dims) for spec in manifest.parts[part].inputs}
        profile |= _slot_shapes(manifest.parts[part].lora)
        if profile not in profiles:
            profiles.append(profile)
    return tuple(profiles)


def _dimensions(manifest: Manifest, part: str, size: Size, batch: SizeRange) -> dict[str, tuple[int, int, int]]:
    """Symbol of each dynamic axis of the part's inputs -> its (smallest, optimal, largest) value."""
    token_px = manifest.latents.patch_size * manifest.latents.vae_scale_factor
    height = [px // token_px for px in _triple(size.height_px, DEFAULT_SIZE_PX)]
    width = [px // token_px for px in _triple(size.width_px, DEFAULT_SIZE_PX)]
    text = manifest.text.max_sequence_length
    usual = facts(manifest.family).usual_text_tokens(text)
    steps = manifest.schedule.num_inference_steps
    dims = {
        "batch": _triple(batch, batch.min),
        "steps": (1, steps, max(steps, MAX_STEPS)),
        "text_tokens": (1, usual, text),
        "image_tokens": (height[0] * width[0], height[1] * width[1], height[2] * width[2]),
        "latent_height": (height[0], height[1], height[2]),
        "latent_width": (width[0], width[1], width[2]),
    }
    if part == "conditioner":  # runs once per distinct prompt, and images of one prompt share its modulation
        dims["batch"] = (1, 1, batch.max)
    elif signature(manifest.family, part).input("input_ids") is not None:
        # Text encoders run one prompt at a time. They also see the template's tokens, whose states are dropped later.
        dims["batch"] = (1, 1, 1)
        dims["text_tokens"] = tuple(manifest.text.drop_tokens + n for n in (1, usual, text))  # type: ignore[assignment]
        if (clip := manifest.text.clip_tokens) is not None:
            dims["clip_tokens"] = (clip, clip, clip)
    return dims


def _shapes(manifest: Manifest, part: str, spec: TensorSpec, dims: Mapping[str, tuple[int, int, int]]) -> ShapeRange:
    tensor = signature(manifest.family, part).input(spec.name)
    axes = () if tensor is None else tensor.axes
    dynamic = [i for i, d in enumerate(spec.shape) if isinstance(d, str)]
    if len(axes) != len(spec.shape) or any(axes[i] not in dims for i in dynamic):
        raise BundleError(
            f"{part}: input {spec.name} must have the axes of rule B9 (docs/bundle.md), got {list(spec.shape)}; "
            "export the bundle again"
        )
    rows = [(d, d, d) if isinstance(d, int) else dims[str(axis)] for d, axis in zip(spec.shape, axes, strict=True)]
    low, best, high = zip(*rows, strict=True)
    return ShapeRange(low, best, high)


def _slot_shapes(slots: LoraSlots | None) -> Profile:
    """Ranks from the smallest that a slot takes to the largest. An engine has no rank 0: no LoRA is a LoRA of zeros."""
    if slots is None:
        return {}
    low, best, high = (
        slots.shapes({}, rank) for rank in (slots.rank_multiple, min(USUAL_RANK, slots.max_rank), slots.max_rank)
    )
    return {name: ShapeRange(low[name][0], best[name][0], high[name][0]) for name in low}


def _triple(span: SizeRange, best: int) -> tuple[int, int, int]:
    return span.min, min(max(best, span.min), span.max), span.max


def _parse_range(text: str, option: str, item: str) -> SizeRange:
    try:
        numbers = [int(n) for n in text.split("-")]
        low, high = numbers if len(numbers) == 2 else (*numbers, *numbers)
    except ValueError:
        raise RequestError(f"{option} must be a number or a range such as 1-4, got {item!r}") from None
    if not 1 <= low <= high:
        raise RequestError(f"{option}: a range must be LOW-HIGH with 1 <= LOW <= HIGH, got {item!r}")
    return SizeRange(low, high)


def _check_size(size: Size, manifest: Manifest) -> None:
    multiple = manifest.latents.patch_size * manifest.latents.vae_scale_factor
    _check_range("--resolutions: height", size.height_px, manifest.ranges.height_px, multiple)
    _check_range("--resolutions: width", size.width_px, manifest.ranges.width_px, multiple)


def _check_range(what: str, asked: SizeRange, allowed: SizeRange, multiple: int) -> None:
    shown = str(asked.min) if asked.min == asked.max else f"{asked.min}-{asked.max}"
    if asked.min % multiple or asked.max % multiple:
        raise RequestError(f"{what} must be a multiple of {multiple}, got {shown}")
    if asked.min < allowed.min or asked.max > allowed.max:
        raise RequestError(
            f"{what} must be between {allowed.min} and {allowed.max} for this bundle, got {shown}; "
            "export a bundle with a wider range, or choose values within it"
        )
