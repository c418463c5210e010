"""Read the arguments of diffusers' pipelines: convert those that apply here, and reject the others with a reason.

Called by `Pipeline.__call__` and `check_request`, so that code written for diffusers runs or gets a clear error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.engines.denoiser import Embeddings
from arcflow_runtime.errors import RequestError

#: diffusers' name of an output type -> ours.
OUTPUT_TYPES = {"np": "numpy", "latent": "latents"}

_ONE_PASS = "a negative prompt can only be given as the text negative_prompt, to a bundle that is guided by it"
_SCHEDULE = "the student was trained for the bundle's schedule; give num_inference_steps"
_ADAPTERS = "a bundle has no image encoder"
_REFUSED = {
    "prompt_2": "both text encoders read the same prompt",
    "negative_prompt_2": _ONE_PASS,
    "negative_prompt_embeds": _ONE_PASS,
    "negative_pooled_prompt_embeds": _ONE_PASS,
    "negative_prompt_embeds_mask": _ONE_PASS,
    "prompt_embeds_mask": "every token of prompt_embeds counts; leave padding out of it",
    "sigmas": _SCHEDULE,
    "timesteps": _SCHEDULE,
    "ip_adapter_image": _ADAPTERS,
    "ip_adapter_image_embeds": _ADAPTERS,
    "negative_ip_adapter_image": _ADAPTERS,
    "negative_ip_adapter_image_embeds": _ADAPTERS,
    "joint_attention_kwargs": "the scales of LoRAs are given as loras",
    "attention_kwargs": "the scales of LoRAs are given as loras",
    "callback_on_step_end_tensor_inputs": "a callback is given the step and the latents",
    "return_dict": "the result is always an object with the field images",
}


def refuse_others(others: Mapping[str, object]) -> None:
    """Reject arguments of diffusers' pipelines that are not supported here. None counts as not given.

    Raises:
        RequestError: names the first such argument and the reason, or an argument that diffusers does not have either.
    """
    for name, value in others.items():
        if name not in _REFUSED:
            raise RequestError(f"unknown argument {name!r}; see help(Pipeline.__call__)")
        if value is not None and not (name == "return_dict" and value is True):
            raise RequestError(f"{name} is not supported: {_REFUSED[name]}; leave it out")


def check_callback(name: str, callback: object, given: str) -> None:
    """Check that the callback `name` can be called with a step and what is `given` with it, "latents" or "images".

    Raises:
        RequestError: it is not a function, or it takes other arguments, such as those of diffusers' callbacks.
    """
    if callback is None:
        return
    if not callable(callback):
        raise RequestError(f"{name} must be a function, got {callback!r}")
    try:
        signature = inspect.signature(callback)
    except ValueError:  # some built-in functions have no signature
        return
    try:
        signature.bind(0, None)
    except TypeError:
        raise RequestError(
            f"{name} must take the step and the {given}, got a function of {signature}: diffusers' "
            "arguments (pipe, step, timestep, kwargs) are not passed, since a callback cannot replace the latents"
        ) from None


def seed_of(generator: Any) -> int | list[int]:
    """The `initial_seed()` of a `torch.Generator`, or of each generator in a list.

    Raises:
        RequestError: it is not a generator, or not one on the CPU; other devices generate other numbers.
    """
    if isinstance(generator, (list, tuple)):
        return [_initial_seed(f"generator[{i}]", g) for i, g in enumerate(generator)]
    return _initial_seed("generator", generator)


def _initial_seed(name: str, generator: Any) -> int:
    seed: Callable[[], int] | None = getattr(generator, "initial_seed", None)
    if not callable(seed):
        raise RequestError(f"{name} must be a torch.Generator or a list of them, got {generator!r}; or give seed")
    device = getattr(getattr(generator, "device", None), "type", "cpu")
    if device != "cpu":
        raise RequestError(
            f"{name} must be a generator on the CPU, got one on {device}, which draws other numbers; or give seed"
        )
    return int(seed())


def latents_of(value: object, shape: tuple[int, ...]) -> np.ndarray:
    """Convert the caller's noise to float32 and check that it has `shape` [B, N, C], packed as in diffusers.

    Raises:
        RequestError: it has another shape or type, or is not finite.
    """
    latents = _array("latents", value)
    if latents.shape != shape:
        raise RequestError(
            f"latents must have shape {list(shape)} (images, tokens, packed channels), got {list(latents.shape)}"
        )
    return latents


def embeddings_of(manifest: Manifest, states: object, pooled: object) -> tuple[Embeddings, ...]:
    """Convert the caller's text states [P, T, Dt] and pooled vectors [P, Dp] to the embeddings of P prompts.

    Raises:
        RequestError: their shapes do not match each other or the student.
    """
    shapes = {
        s.name: s.shape for p in ("backbone", "conditioner") if p in manifest.parts for s in manifest.parts[p].inputs
    }
    longest, width = manifest.text.max_sequence_length, shapes["encoder_hidden_states"][-1]
    x = _array("prompt_embeds", states)
    if x.ndim != 3 or 0 in x.shape or x.shape[1] > longest or x.shape[2] != width:
        raise RequestError(
            f"prompt_embeds must have shape [prompts, tokens, {width}] with 1 to {longest} tokens, got {list(x.shape)}"
        )
    if "pooled_projections" not in shapes:
        if pooled is not None:
            raise RequestError("pooled_prompt_embeds is not supported: this student has no pooled text; leave it out")
        return tuple(Embeddings(row[None], None) for row in x)
    if pooled is None:
        raise RequestError("pooled_prompt_embeds must be given with prompt_embeds: this student needs pooled text")
    y = _array("pooled_prompt_embeds", pooled)
    expected = (len(x), shapes["pooled_projections"][-1])
    if y.shape != expected:
        raise RequestError(
            f"pooled_prompt_embeds must have shape {list(expected)}, one row for each of prompt_embeds, "
            f"got {list(y.shape)}"
        )
    return tuple(Embeddings(row[None], vector[None]) for row, vector in zip(x, y, strict=True))


def _array(name: str, value: Any) -> np.ndarray:
    """A float32 copy, so that the caller cannot change the values during the call."""
    try:
        if hasattr(value, "detach"):  # a torch tensor, on any device and in any dtype
            value = value.detach().float().cpu().numpy()
        array = np.array(value)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"numbers of type {array.dtype}")
        array = array.astype(np.float32)
    except (TypeError, ValueError) as e:
        raise RequestError(f"{name} must be an array of numbers, got {type(value).__name__} ({e})") from None
    if not np.isfinite(array).all():
        raise RequestError(f"{name} must be finite in float32, got NaN or Inf")
    array.setflags(write=False)
    return array


def one_of(given: Mapping[str, object], why: str) -> None:
    """Check that at most one of several alternative arguments is given.

    Args:
        given: argument name -> value; None if not given.
        why: what the arguments have in common, for the message.

    Raises:
        RequestError: more than one value is not None.
    """
    names: Sequence[str] = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)} must not be given together: {why}")
