"""Check the values of a manifest: raise an error for the first rule that it breaks. Called when a bundle is opened."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from arcflow_runtime.disk.families import facts as family_facts
from arcflow_runtime.disk.manifest import MAX_RANK, MODULATION, RANK_MULTIPLE, STRAIGHT_VERSION, Manifest
from arcflow_runtime.disk.quant_formats import FORMATS, formats_of
from arcflow_runtime.disk.signatures import signature
from arcflow_runtime.errors import BundleError

#: The largest default scale of guidance with a negative prompt, and the largest one of a request.
MAX_TRUE_CFG_SCALE = 65.0
#: The largest mu of a dynamic shift.
MAX_MU = 16.0


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
    yield from _lora_rules(m)
    yield from _sampler_rules(m)
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
        strangers = sorted((q.formats or {}).keys() - set(q.layers))
        yield not strangers, f"{key}: formats", "given for names of layers only", strangers
        yield _is_sha256(q.policy), f"{key}: policy", "a SHA-256", q.policy
        if any(FORMATS[name].calibrated for name in formats_of(part)):
            yield q.scales is not None and _is_sha256(q.scales), f"{key}: scales", "a SHA-256", q.scales
        else:
            yield q.scales is None, f"{key}: scales", "null for a format without calibration", q.scales


def _is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _lora_rules(m: Manifest) -> Iterator[tuple[bool, str, str, object]]:
    found = m.slots()
    if m.sampler == "momentum":
        needed = m.needed_version
        yield m.version == needed, "version", f"{needed} for these slots and formats (B14, B15)", m.version
    floats = ("float32", "float16", "bfloat16")
    for name, slots in found.items():
        key = f"{MODULATION}: lora" if name == MODULATION else f"parts.{name}: lora"
        yield bool(slots.layers), f"{key}: layers", "at least one, or no lora", list(slots.layers)
        yield slots.rank_multiple == RANK_MULTIPLE, f"{key}: rank_multiple", str(RANK_MULTIPLE), slots.rank_multiple
        fits = 0 < slots.max_rank <= MAX_RANK and slots.max_rank % RANK_MULTIPLE == 0
        yield fits, f"{key}: max_rank", f"a multiple of {RANK_MULTIPLE} up to {MAX_RANK}", slots.max_rank
        for layer, sizes in slots.layers.items():
            yield sizes.dtype in floats, f"{key}: {layer}: dtype", f"one of {list(floats)}", sizes.dtype
            size = (sizes.in_features, sizes.out_features)
            yield min(size) >= 1, f"{key}: {layer}", "of at least one input and output", size
    every = Counter(layer for slots in found.values() for layer in slots.layers)
    twice = sorted(layer for layer, count in every.items() if count > 1)
    yield not twice, "lora: layers", "in one part each", twice
    ranks = sorted({slots.max_rank for slots in found.values()})
    yield len(ranks) <= 1, "lora: max_rank", "the same in every part", ranks
    table = m.modulation
    if table is None or table.lora is None:
        columns = None if table is None else table.columns
        yield columns is None, f"{MODULATION}: columns", "given with lora only", columns
        return
    yield "conditioner" not in m.parts, f"{MODULATION}: lora", "null in a bundle with a conditioner", "slots"
    columns = table.columns or {}
    named = sorted(table.lora.layers)
    yield sorted(columns) == named, f"{MODULATION}: columns", f"given for {named}", sorted(columns)
    wide = next((s.shape[-1] for s in m.parts["backbone"].inputs if s.name == "modulation"), 0)
    for layer, sizes in table.lora.layers.items():
        fits = isinstance(wide, int) and columns[layer] + sizes.out_features <= wide
        yield fits, f"{MODULATION}: columns: {layer}", f"at most {wide} with its outputs", columns[layer]
        yield sizes.dtype == "float32", f"{MODULATION}: lora: {layer}: dtype", "float32", sizes.dtype


def _sampler_rules(m: Manifest) -> Iterator[tuple[bool, str, str, object]]:
    s, k = m.schedule, m.latents
    straight, adapter = m.sampler == "linear", m.provenance.adapter
    must = f"{'null' if straight else 'given'} for the sampler {m.sampler!r} (B16)"
    yield (adapter is None) == straight, "provenance: adapter", must, adapter
    if m.sampler == "momentum":
        return
    yield m.version == STRAIGHT_VERSION, "version", f"{STRAIGHT_VERSION} for the sampler 'linear' (B16)", m.version
    yield k.num_gaussians == 1, "latents: num_gaussians", "1 for a straight student", k.num_gaussians
    if "backbone" in m.parts:
        wanted = [t.name for t in signature(m.family, "backbone", m.sampler).outputs]
        names = [t.name for t in m.parts["backbone"].outputs]
        yield names == wanted, "parts.backbone: outputs", f"{wanted} for a straight student", names
    scale = m.true_cfg_scale
    if family_facts(m.family).true_cfg:
        fits = scale is not None and 1 <= scale <= MAX_TRUE_CFG_SCALE
        yield fits, "true_cfg_scale", f"between 1 and {MAX_TRUE_CFG_SCALE:g}", scale
    else:
        yield scale is None, "true_cfg_scale", f"null for a {m.family} bundle", scale
    if s.terminal is not None:
        yield 0 < s.terminal < 1, "schedule: terminal", "above 0 and below 1, or null", s.terminal
    if s.sigmas is not None:
        falls = all(a > b for a, b in zip((math.inf, *s.sigmas), (*s.sigmas, 0.0), strict=True))
        falls = falls and bool(s.sigmas) and s.sigmas[0] <= 1
        yield falls, "schedule: sigmas", "falling from at most 1 and above 0", list(s.sigmas)
        steps, count = s.num_inference_steps, len(s.sigmas)
        yield steps == count, "schedule: num_inference_steps", f"{count}, the number of sigmas", steps
        yield s.timestep_ratio == 1, "schedule: timestep_ratio", "1 with sigmas", s.timestep_ratio
    d = s.dynamic_shift
    if d is not None:
        key = "schedule: dynamic_shift"
        yield s.shift == 1, "schedule: shift", "1 with dynamic_shift", s.shift
        tokens = (d.base_image_tokens, d.max_image_tokens)
        yield tokens[0] < tokens[1], f"{key}: base_image_tokens", "below max_image_tokens", tokens
        # At the smallest and the largest image, so that no size overflows or divides by 0.
        least = 0.0 if d.kind == "linear" else -MAX_MU
        for image in (m.ranges.height_px.min * m.ranges.width_px.min, m.ranges.height_px.max * m.ranges.width_px.max):
            mu = d.mu(image // (k.patch_size * k.vae_scale_factor) ** 2)
            yield least < mu <= MAX_MU, f"{key}: mu", f"above {least:g} and at most {MAX_MU:g} for every size", mu
        yield m.modulation is None, "modulation", "null with dynamic_shift, which depends on the image's size", "given"


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
