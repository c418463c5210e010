"""The model that Triton's Python backend runs: requests with prompts and seeds -> images, batch by batch.

Triton imports this through the model.py that `arcflow triton` writes, in a process of its own for each instance.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # Triton's stub brings it; it is in no package.
from numpy.typing import NDArray

from arcflow_runtime.errors import RequestError
from arcflow_serve.errors import is_out_of_memory
from arcflow_serve.models import Model, open_models
from arcflow_serve.settings import Settings


@dataclass(frozen=True)
class _Key:
    """What the images of one call have in common."""

    height_px: int
    width_px: int
    num_inference_steps: int
    guidance_scale: float | None
    loras: tuple[tuple[str, float], ...]
    true_cfg_scale: float | None


@dataclass(frozen=True)
class _Row:
    """One image to generate, of the request with this index; `negative` is set if its key has a `true_cfg_scale`."""

    request: int
    prompt: str
    seed: int
    negative: str | None


@dataclass(frozen=True)
class _Image:
    """One image [H, W, 3], and the number of images generated together."""

    pixels: NDArray[np.uint8]
    seed: int
    batch_size: int


class TritonPythonModel:
    """One instance; Triton calls its methods by these names, one call at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that the configuration names."""
        config = json.loads(args["model_config"])
        chosen = {key: value["string_value"] for key, value in config["parameters"].items()}
        if args["model_instance_kind"] == "GPU":
            # The runtime takes the first GPU that it sees, and has not looked yet.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        threads = int(chosen["threads"]) if "threads" in chosen else None
        loras = tuple(map(Path, json.loads(chosen.get("loras", "[]"))))
        settings = Settings(backend=chosen["backend"], lanes=1, threads=threads, loras=loras)
        (self._model,) = open_models([Path(chosen["bundle"])], settings).values()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that Triton has put together; each gets its images or an error of its own."""
        errors: list[Any] = [None] * len(requests)
        groups: dict[_Key, list[_Row]] = {}
        for i, request in enumerate(requests):
            try:
                if request.is_cancelled():
                    errors[i] = triton.TritonError("the client has left", triton.TritonError.CANCELLED)
                    continue
                key, rows = _read(self._model, i, request)
                groups.setdefault(key, []).extend(rows)
            except Exception as e:
                # Whatever it is, it must not reach the other requests.
                errors[i] = _error(e)
        images: list[list[_Image]] = [[] for _ in requests]
        for key, rows in groups.items():
            for row, found in zip(rows, self._generate_all(key, rows), strict=True):
                if isinstance(found, Exception):
                    errors[row.request] = _error(found)
                else:
                    images[row.request].append(found)
        return [
            triton.InferenceResponse(error=error) if error is not None else _response(done)
            for error, done in zip(errors, images, strict=True)
        ]

    def finalize(self) -> None:
        """Free the bundle."""
        self._model.close()

    def _generate_all(self, key: _Key, rows: list[_Row]) -> Sequence[_Image | Exception]:
        """Generate a batch; if it fails, its images one by one, so that only the image at fault gets the error."""
        try:
            images = self._generate(key, rows)
        except Exception as e:
            if len(rows) > 1:
                return [self._generate_all(key, [row])[0] for row in rows]
            if not isinstance(e, RequestError):
                self._model.failed(for_memory=is_out_of_memory(e))
            return [e]
        self._model.succeeded()
        return images

    def _generate(self, key: _Key, rows: list[_Row]) -> list[_Image]:
        guided: dict[str, Any] = {}
        if key.true_cfg_scale is not None:
            guided = {"negative_prompt": [row.negative for row in rows], "true_cfg_scale": key.true_cfg_scale}
        # After too many failures, which may be of this call, the bundle is loaded again. No other thread does that.
        self._model.restore()
        with self._model.use() as pipeline:
            output = pipeline(
                [row.prompt for row in rows],
                height=key.height_px,
                width=key.width_px,
                num_inference_steps=key.num_inference_steps,
                guidance_scale=key.guidance_scale,
                seed=[row.seed for row in rows],
                loras=dict(key.loras),
                **guided,
            )
        found = zip(rows, output.images, strict=True)
        return [_Image(np.asarray(image), row.seed, len(rows)) for row, image in found]


def _read(model: Model, index: int, request: Any) -> tuple[_Key, list[_Row]]:
    """Check one request; it may ask for several images, all of one size, with the same LoRAs and guidance.

    Raises:
        RequestError: an input is wrong; the message begins with its name.
    """
    inputs = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}

    def texts(name: str) -> list[str]:
        try:
            return [bytes(p).decode("utf-8") for p in inputs[name]]
        except UnicodeDecodeError:
            raise RequestError(f"{name} must be text in UTF-8") from None

    def one(name: str) -> Any:
        values: set[Any] = set(inputs[name].tolist()) if name in inputs else {None}
        if len(values) != 1:
            raise RequestError(f"{name} must be the same for all images of a request, got {sorted(values)}")
        return values.pop()

    width, height = one("width"), one("height")
    if (width is None) != (height is None):
        raise RequestError("width and height must be given together, or neither")
    size = None if width is None else (width, height)
    prompts = texts("prompt")
    negatives: list[str | None] = [*texts("negative_prompt")] if "negative_prompt" in inputs else [None] * len(prompts)
    seeds = inputs["seed"].tolist() if "seed" in inputs else [secrets.randbits(32) for _ in prompts]
    loras = _loras(one("loras"))
    rows = []
    for prompt, negative, seed in zip(prompts, negatives, seeds, strict=True):
        checked = model.check(
            prompt,
            size,
            one("num_inference_steps"),
            one("guidance_scale"),
            None,
            negative,
            one("true_cfg_scale"),
            loras,
        )
        guided = checked.negative_prompts is not None
        rows.append(_Row(index, prompt, seed, negative if guided else None))
    key = _Key(
        checked.height_px,
        checked.width_px,
        checked.num_inference_steps,
        checked.guidance_scale,
        checked.loras,
        checked.true_cfg_scale if guided else None,
    )
    return key, rows


def _loras(text: bytes | None) -> dict[str, Any] | None:
    """The LoRAs of a request, a JSON object of names and scales."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        shown = text[:60].decode("utf-8", "replace")
        raise RequestError(f'loras must be a JSON object of names and scales such as {{"ink": 0.8}}, got {shown!r}')
    return found


def _error(error: Exception) -> Any:
    kind = triton.TritonError.INVALID_ARG if isinstance(error, RequestError) else triton.TritonError.INTERNAL
    return triton.TritonError(str(error) or type(error).__name__, kind)


def _response(images: list[_Image]) -> Any:
    outputs = {
        "image": np.stack([image.pixels for image in images]),
        "image_seed": np.array([[image.seed] for image in images], np.uint64),
        "batch_size": np.array([[image.batch_size] for image in images], np.int32),
    }
    return triton.InferenceResponse([triton.Tensor(name, value) for name, value in outputs.items()])
