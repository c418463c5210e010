"""Call libarcflow from Python with ctypes, as any language that can call C: embed.py BUNDLE PROMPT OUT.ppm.

It needs numpy and no Python package of this project. ARCFLOW_LIBRARY names the library if the system does not find it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p

import numpy as np

STEP_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, c_void_p, c_int32, POINTER(c_float), c_size_t)


class Options(ctypes.Structure):
    """arcflow_options."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("backend", c_char_p),
        ("threads", c_int32),
        ("low_memory", c_int32),
        ("full_check", c_int32),
        ("memory", c_char_p),
    )


class Tokens(ctypes.Structure):
    """arcflow_tokens."""

    _fields_ = (("ids", POINTER(c_int64)), ("count", c_size_t), ("ids_2", POINTER(c_int64)), ("count_2", c_size_t))


class ScaledLora(ctypes.Structure):
    """arcflow_scaled_lora."""

    _fields_ = (("lora", c_void_p), ("scale", c_float))


class Request(ctypes.Structure):
    """arcflow_request."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("prompts", POINTER(c_char_p)),
        ("tokens", POINTER(Tokens)),
        ("prompt_count", c_size_t),
        ("num_images_per_prompt", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("num_inference_steps", c_int32),
        ("max_sequence_length", c_int32),
        ("guidance_scale", c_float),
        ("seeds", POINTER(c_uint64)),
        ("seed_count", c_size_t),
        ("skip_decode", c_int32),
        ("on_step", STEP_CALLBACK),
        ("user", c_void_p),
        ("loras", POINTER(ScaledLora)),
        ("lora_count", c_size_t),
        ("negative_prompts", POINTER(c_char_p)),
        ("negative_tokens", POINTER(Tokens)),
        ("negative_prompt_count", c_size_t),
        ("true_cfg_scale", c_float),
    )


#: Return type and argument types of each function in arcflow.h.
FUNCTIONS = {
    "arcflow_abi_version": (c_uint32, []),
    "arcflow_version": (c_char_p, []),
    "arcflow_last_error": (c_char_p, []),
    "arcflow_backends": (c_char_p, []),
    "arcflow_open": (c_int32, [c_char_p, POINTER(Options), POINTER(c_void_p)]),
    "arcflow_close": (None, [c_void_p]),
    "arcflow_memory": (c_char_p, [c_void_p]),
    "arcflow_lora_open": (c_int32, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "arcflow_lora_close": (None, [c_void_p]),
    "arcflow_generate": (c_int32, [c_void_p, POINTER(Request), POINTER(c_void_p)]),
    "arcflow_result_free": (None, [c_void_p]),
    "arcflow_result_batch": (c_int32, [c_void_p]),
    "arcflow_result_height": (c_int32, [c_void_p]),
    "arcflow_result_width": (c_int32, [c_void_p]),
    "arcflow_result_pixels": (POINTER(c_uint8), [c_void_p]),
    "arcflow_result_latents": (POINTER(c_float), [c_void_p, POINTER(c_int32), POINTER(c_int32)]),
    "arcflow_result_seeds": (POINTER(c_uint64), [c_void_p, POINTER(c_size_t)]),
    "arcflow_result_warnings": (c_char_p, [c_void_p]),
    "arcflow_result_timings": (c_char_p, [c_void_p]),
    "arcflow_noise": (c_int32, [c_uint64, c_size_t, POINTER(c_float)]),
}


def load(path: str | None = None) -> ctypes.CDLL:
    """Open the library and declare its functions. ctypes lets other threads run during a call."""
    path = path or os.environ.get("ARCFLOW_LIBRARY") or ctypes.util.find_library("arcflow")
    if path is None:
        raise ImportError("libarcflow was not found; install it, or set ARCFLOW_LIBRARY to its path")
    library = ctypes.CDLL(path)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.arcflow_abi_version() != 1:
        raise ImportError(f"this file is for ABI version 1, got {library.arcflow_abi_version()}")
    return library


class ArcFlowError(Exception):
    """A call failed; `status` is an arcflow_status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def texts_of(texts: list[str]) -> ctypes.Array:
    """An array of strings for C."""
    return (c_char_p * len(texts))(*[text.encode() for text in texts])


def tokens_of(tokens: list) -> ctypes.Array:
    """An array of arcflow_tokens: for each prompt a list of ids, or a pair of lists for FLUX."""
    pairs = [t if isinstance(t, tuple) else (t, []) for t in tokens]
    arrays = [((c_int64 * len(a))(*a), (c_int64 * len(b))(*b)) for a, b in pairs]
    return (Tokens * len(pairs))(*[Tokens(a, len(a), b, len(b)) for a, b in arrays])


class Images:
    """A copy of one result: `pixels` [B, H, W, 3] uint8 or None, `latents` [B, N, C] float32, and what else it has."""

    def __init__(self, library: ctypes.CDLL, result: c_void_p) -> None:
        batch, height, width = (getattr(library, f"arcflow_result_{n}")(result) for n in ("batch", "height", "width"))
        tokens, channels, count = c_int32(), c_int32(), c_size_t()
        pixels = library.arcflow_result_pixels(result)
        self.pixels = np.ctypeslib.as_array(pixels, (batch, height, width, 3)).copy() if pixels else None
        latents = library.arcflow_result_latents(result, byref(tokens), byref(channels))
        self.latents = np.ctypeslib.as_array(latents, (batch, tokens.value, channels.value)).copy()
        seeds = library.arcflow_result_seeds(result, byref(count))
        self.seeds = seeds[: count.value]
        self.warnings = library.arcflow_result_warnings(result).decode().splitlines()
        self.timings_ms = json.loads(library.arcflow_result_timings(result))


class Pipeline:
    """A loaded bundle. Several threads may use it at the same time."""

    def __init__(self, library: ctypes.CDLL, bundle: str, **options: object) -> None:
        """Load a bundle; `options` are fields of arcflow_options."""
        self._library, self.handle = library, c_void_p()
        given = Options(struct_size=ctypes.sizeof(Options), **options)
        self._check(library.arcflow_open(os.fsencode(bundle), byref(given), byref(self.handle)))

    @property
    def memory(self) -> str:
        """The memory mode, given or chosen by default."""
        return self._library.arcflow_memory(self.handle).decode()

    def open_lora(self, path: str) -> c_void_p:
        """Read a file that `arcflow lora convert` wrote; free it with `close_lora`."""
        lora = c_void_p()
        self._check(self._library.arcflow_lora_open(self.handle, os.fsencode(path), byref(lora)))
        return lora

    def close_lora(self, lora: c_void_p) -> None:
        """Free a LoRA."""
        self._library.arcflow_lora_close(lora)

    def generate(
        self,
        prompts: list[str] | None = None,
        tokens: list | None = None,
        seeds=(),
        on_step=None,
        loras=(),
        negative_prompts: list[str] | None = None,
        negative_tokens: list | None = None,
        **fields,
    ):
        """Generate images of prompts, or of token ids: for each prompt a list, or a pair of lists for FLUX.

        Negative prompts likewise, one for each prompt or one for all.
        `loras` are pairs of what `open_lora` returned and a scale.
        `on_step(step, latents)` stops the request if it returns a true value. `fields` are fields of arcflow_request.
        """
        request = Request(
            struct_size=ctypes.sizeof(Request), guidance_scale=fields.pop("guidance_scale", -1.0), **fields
        )
        if prompts is not None:
            request.prompts, request.prompt_count = texts_of(prompts), len(prompts)
        if tokens is not None:
            request.tokens, request.prompt_count = tokens_of(tokens), len(tokens)
        if negative_prompts is not None:
            request.negative_prompts, request.negative_prompt_count = texts_of(negative_prompts), len(negative_prompts)
        if negative_tokens is not None:
            request.negative_tokens, request.negative_prompt_count = tokens_of(negative_tokens), len(negative_tokens)
        if seeds:
            request.seeds, request.seed_count = (c_uint64 * len(seeds))(*seeds), len(seeds)
        if loras:
            request.loras = (ScaledLora * len(loras))(*[ScaledLora(lora, scale) for lora, scale in loras])
            request.lora_count = len(loras)
        if on_step is not None:
            # ctypes prints an exception of a callback and returns 0 for it, so a callback must not raise to stop.
            request.on_step = STEP_CALLBACK(
                lambda _, step, x, n: int(on_step(step, np.ctypeslib.as_array(x, (n,)).copy()) or 0)
            )
        result = c_void_p()
        self._check(self._library.arcflow_generate(self.handle, byref(request), byref(result)))
        try:
            return Images(self._library, result)
        finally:
            self._library.arcflow_result_free(result)

    def close(self) -> None:
        """Wait for running calls and free the bundle."""
        self._library.arcflow_close(self.handle)

    def _check(self, status: int) -> None:
        if status:
            raise ArcFlowError(status, self._library.arcflow_last_error().decode())


def main() -> int:
    """Generate one image and write it as a PPM file."""
    if len(sys.argv) != 4:
        print("usage: embed.py BUNDLE PROMPT OUT.ppm", file=sys.stderr)
        return 2
    pipe = Pipeline(load(), sys.argv[1])
    images = pipe.generate([sys.argv[2]])
    pipe.close()
    _, height, width, _ = images.pixels.shape
    with open(sys.argv[3], "wb") as file:
        file.write(b"P6\n%d %d\n255\n" % (width, height) + images.pixels.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
