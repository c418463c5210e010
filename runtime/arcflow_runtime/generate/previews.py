"""Choose the steps after which a pipeline gives previews: number of steps, most previews -> indices of steps."""

from __future__ import annotations

from arcflow_runtime.errors import RequestError


def check_max_previews(most: object, callback: object) -> None:
    """Check the argument `max_previews`, which goes with `callback_on_preview`.

    Raises:
        RequestError: it is neither None nor an integer of at least 0, or there is no callback.
    """
    if most is not None and callback is None:
        raise RequestError("max_previews needs callback_on_preview; give both, or leave it out")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
        raise RequestError(f"max_previews must be an integer of at least 0, or None for all, got {most!r}")


def preview_steps(num_inference_steps: int, most: int | None) -> frozenset[int]:
    """The indices of the steps, never of the last, whose result is the image itself.

    With fewer previews than steps, preview j of N comes after floor(S j / (N + 1)) of the S steps.
    """
    if most is None or most >= num_inference_steps - 1:
        return frozenset(range(num_inference_steps - 1))
    return frozenset(num_inference_steps * j // (most + 1) - 1 for j in range(1, most + 1))
