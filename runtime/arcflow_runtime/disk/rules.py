"""Check the values of a manifest: raise an error for the first rule that it breaks. Called when a bundle is opened."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from arcflow_runtime.disk.families import facts as family_facts
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.errors import BundleError


def check_values(manifest: Manifest, where: str) -> None:
    """Check every value that the pipeline relies on, so that no later stage has to.

    Args:
        manifest: a manifest whose types were checked by `parse`.
        where: the manifest's path, for the message.

    Raises:
        BundleError: names the first wrong key, what it must be and what it is.
    """
    for ok, key, must, got in _rules(manifest):
        if not ok:
            raise BundleError(f"{where}: {key} must be {must}, got {got!r}; export the bundle again")


def _rules(m: Manifest) -> Iterator[tuple[bool, str, str, object]]:
    """(rule holds, key, what the value must be, its value) for each rule."""
    s, k, r, t = m.schedule, m.latents, m.rotary, m.text
    floats = ("float32", "float16", "bfloat16")
    yield m.dtype in floats, "dtype", f"one of {list(floats)}", m.dtype
    yield m.reference_dtype in floats, "reference_dtype", f"one of {list(floats)}", m.reference_dtype
    yield math.isfinite(s.shift) and s.shift > 0, "schedule: shift", "positive", s.shift
    yield 0 < s.timestep_ratio <= 1, "schedule: timestep_ratio", "above 0 and at most 1", s.timestep_ratio
    yield s.num_inference_steps >= 1, "schedule: num_inference_steps", "at least 1", s.num_inference_steps
    for key in ("channels", "patch_size", "vae_scale_factor", "num_gaussians"):
        yield getattr(k, key) >= 1, f"latents: {key}", "at least 1", getattr(k, key)
    sub_pixels = k.patch_size**2
    yield (
        k.logweights_channels == sub_pixels,
        "latents: logweights_channels",
        f"patch_size squared, {sub_pixels}",
        k.logweights_channels,
    )
    yield math.isfinite(r.theta) and r.theta > 0, "rotary: theta", "positive", r.theta
    axes = len(r.axes_dims) == 3 and all(d > 0 and d % 2 == 0 for d in r.axes_dims)
    yield axes, "rotary: axes_dims", "three even sizes", list(r.axes_dims)
    yield t.max_sequence_length >= 1, "text: max_sequence_length", "at least 1", t.max_sequence_length
    for key in ("batch", "height_px", "width_px"):
        span = getattr(m.ranges, key)
        yield (
            1 <= span.min <= span.max,
            f"ranges: {key}",
            "min and max with 1 <= min <= max",
            (span.min, span.max),
        )
    token_px = k.patch_size * k.vae_scale_factor
    for key in ("height_px", "width_px"):
        span = getattr(m.ranges, key)
        yield (
            span.min % token_px == 0 and span.max % token_px == 0,
            f"ranges: {key}",
            f"multiples of {token_px}",
            (span.min, span.max),
        )
    yield from _text_rules(m)
    yield from _quantization_rules(m)
    if m.modulation is not None and "conditioner" not in m.parts:
        baked = m.modulation.num_inference_steps
        yield (
            s.num_inference_steps in baked,
            "schedule: num_inference_steps",
            f"one of {list(baked)}",
            (s.num_inference_steps),
        )


def _quantization_rules(m: Manifest) -> Iterator[tuple[bool, str, str, object]]:
    for name, part in m.parts.items():
        q = part.quantization
        if q is None:
            continue
        key = f"parts.{name}: quantization"
        yield bool(q.layers), f"{key}: layers", "at least one, or no quantization", list(q.layers)
        twice = sorted(layer for layer, count in Counter(q.layers).items() if count > 1)
        yield not twice, f"{key}: layers", "named once each", twice
        for digest in ("policy", "scales"):
            value = getattr(q, digest)
            yield re.fullmatch("[0-9a-f]{64}", value) is not None, f"{key}: {digest}", "a SHA-256", value


def _text_rules(m: Manifest) -> Iterator[tuple[bool, str, str, object]]:
    t = m.text
    facts = family_facts(m.family)
    if facts.text == "clip-t5":
        for key in ("clip_tokens", "clip_pad_token_id", "t5_pad_token_id"):
            yield getattr(t, key) is not None, f"text: {key}", f"given for a {m.family} bundle", None
    else:
        fits = t.template is not None and t.template.count("{}") == 1
        yield fits, "text: template", "a text with one {} for the prompt", t.template
    wanted = sorted(facts.tokenizers)
    yield sorted(m.tokenizers) == wanted, "tokenizers", f"given for {wanted}", sorted(m.tokenizers)
