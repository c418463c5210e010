"""The pipeline, the runtime's main entry point: prompts -> tokens -> text states -> modulation -> latents -> images.

More than 400 lines, because a third of them describe the arguments that users give.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import get_args

import numpy as np
from PIL import Image

from arcflow_runtime.backends import DEFAULT_BACKEND, open_for
from arcflow_runtime.disk.bundle import Bundle, Check
from arcflow_runtime.disk.rules import MAX_TRUE_CFG_SCALE
from arcflow_runtime.engines.base import Backend
from arcflow_runtime.engines.denoiser import Denoiser, DenoisingBackend, Embeddings
from arcflow_runtime.engines.modes import MemoryMode
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.errors import RequestError
from arcflow_runtime.generate.calls import Calls
from arcflow_runtime.generate.condition import Conditioner
from arcflow_runtime.generate.decode import check_not_flat, decode_latents, to_float, to_pil
from arcflow_runtime.generate.denoise import StepCallback, check_finite, denoise, denoise_on_device, join
from arcflow_runtime.generate.diffusers_arguments import check_callback, refuse_others
from arcflow_runtime.generate.encode import encode_prompts
from arcflow_runtime.generate.inputs import (
    conditioning_of,
    first_step,
    grid_of,
    groups_of,
    jobs_of,
    packed_noise,
    schedule_of,
)
from arcflow_runtime.generate.memory import check_memory, fitting_memory
from arcflow_runtime.generate.previews import check_max_previews, preview_steps
from arcflow_runtime.generate.request import Request, check_request
from arcflow_runtime.generate.straight import Negative, denoise_straight
from arcflow_runtime.generate.text import EmbeddingCache, PromptTokenizer, blank_text
from arcflow_runtime.hub.bundles import find_bundle
from arcflow_runtime.lora.open import open_lora
from arcflow_runtime.lora.prepare import NO_LORAS, PreparedLoras, blank_loras
from arcflow_runtime.lora.store import LoraStore
from arcflow_runtime.maths.noise import GROUP
from arcflow_runtime.maths.rotary import image_rotary

_log = logging.getLogger("arcflow")

#: Called with the index of a step and the images that `PipelineOutput.images` describes.
PreviewCallback = Callable[[int, "list[Image.Image] | np.ndarray"], object]


@dataclass(frozen=True)
class PipelineOutput:
    """The result of one call of a pipeline.

    `images` is a list of B PIL images, [B, H, W, 3] float32 in [0, 1] ("numpy") or [B, N, 64] float32 ("latents").
    `seed` gives the same noise when passed to another call; it is None if the caller gave the noise. `timings_ms` has
    the wall time of every stage, and "total".
    """

    images: list[Image.Image] | np.ndarray
    seed: int | tuple[int, ...] | None
    warnings: tuple[str, ...]
    timings_ms: Mapping[str, float]


class Pipeline:
    """A loaded bundle that generates images; safe to call from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend, memory: MemoryMode | None = None) -> None:
        """Load the parts of an opened bundle; `Pipeline.load` does this from a path.

        Raises:
            EngineError: the backend cannot run the bundle or load a part.
            BundleError: a tokenizer or the modulation table cannot be read, or the bundle was replaced meanwhile.
            RequestError: `memory` is not a mode.
        """
        check_memory(memory)
        backend.check(bundle)
        self.bundle = bundle
        #: The memory mode, given or chosen.
        self.memory: MemoryMode = memory or fitting_memory(bundle, backend)
        self._calls = Calls()
        #: Tokenises prompts as this pipeline does.
        self.tokenizer = PromptTokenizer(bundle)
        self._cache = EmbeddingCache()
        self._loras = LoraStore(bundle.manifest)
        self._conditioner = Conditioner(bundle)
        self._parts = Parts(bundle, backend, self.memory)
        self._denoiser: Denoiser | None = None
        try:
            self._open(backend)
        except BaseException:
            self.close()
            raise

    def _open(self, backend: Backend) -> None:
        """Load the engines and open the denoiser. If this raises, the caller closes whatever was opened."""
        bundle = self.bundle
        self._parts.open_kept()
        latents = bundle.manifest.latents
        # The GPU kernel generates noise in groups of 16 numbers, so an image's latent size must be a multiple of 16.
        # Height and width of the latents are multiples of patch_size.
        fits = latents.channels * latents.patch_size**2 % GROUP == 0
        if isinstance(backend, DenoisingBackend) and fits:
            self._denoiser = backend.open_denoiser(bundle, self._parts)
        bundle.check_unchanged()

    @staticmethod
    def load(
        bundle: str | Path,
        backend: str = DEFAULT_BACKEND,
        memory: MemoryMode | None = None,
        check: Check = "fast",
        threads: int | None = None,
        *,
        revision: str | None = None,
        low_memory: object = None,
    ) -> Pipeline:
        """Load a bundle from a directory or from the hub.

        Args:
            bundle: the directory that `arcflow export` wrote, or a hub id such as `owner/name`, which is downloaded
                into the hub's cache. A path that exists wins over an id.
            backend: the library that runs the graphs, a key of `backends.BACKENDS`, or "auto" for the fastest that is
                installed and runs the bundle on this machine.
            memory: which parts stay in the memory of the backend's device. "resident": all. "balanced": backbone and
                VAE decoder; text encoders and conditioner are loaded one at a time when a prompt, guidance scale or
                number of steps is new. "low": none; each part is loaded while it is used, one at a time. The images are
                the same in all modes.
            check: "fast" compares file sizes and hashes small files, "full" hashes every file.
            threads: CPU threads per engine, at most one per core; None lets the engine choose.
            revision: branch, tag or commit of a bundle on the hub; None is the default branch.
            low_memory: the former name of `memory`; an error that says so.

        A GPU backend runs on the first GPU visible under the environment variable CUDA_VISIBLE_DEVICES.

        A process that forks must load after the fork. The threads of an engine do not exist in the child, which would
        wait for them for ever.

        Raises:
            BundleError: the bundle is missing, damaged or of an unsupported version, or was replaced while loading.
            EngineError: the backend is unknown or cannot run the bundle.
            RequestError: `memory`, `check` or `threads` is out of range.
            SourceError: the bundle on the hub cannot be downloaded, or a file of it is damaged.
        """
        if low_memory is not None:
            raise RequestError(f"low_memory is now memory; give memory={'low' if low_memory else 'resident'!r} instead")
        if check not in get_args(Check):
            raise RequestError(f"check must be one of {list(get_args(Check))}, got {check!r}")
        opened = Bundle.open(find_bundle(bundle, revision).path, check)
        return Pipeline(opened, open_for(opened, backend, threads), memory)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        *,
        callback_on_preview: PreviewCallback | None = None,
        max_previews: int | None = None,
        generator: object = None,
        latents: object = None,
        prompt_embeds: object = None,
        pooled_prompt_embeds: object = None,
        loras: Mapping[str, float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float | None = None,
        **others: object,
    ) -> PipelineOutput:
        """Generate images.

        Args:
            prompt: one prompt or a list. The batch has B images: num_images_per_prompt of each prompt, in order.
            height: in pixels, a multiple of 16 within the bundle's range; None is 1024 or the nearest allowed.
            width: as `height`.
            num_inference_steps: number of backbone runs; None is the bundle's (2).
            guidance_scale: for a student with guidance; None is 3.5. Other students ignore it with a warning.
            seed: an int is one generator for the noise of the whole batch. A list of B ints is one generator per image,
                so that each image can be generated again alone. None takes random seeds and returns them in the output.
            num_images_per_prompt: images per prompt.
            max_sequence_length: largest number of text tokens; None is the bundle's.
            output_type: "pil", "numpy" or "np", "latents" or "latent".
            callback_on_step_end: called after each step with its index and the latents, [B, N, 64] float32,
                read-only; its return value is ignored. It must not call this pipeline.
            callback_on_preview: called after each step but the last with its index and a preview of the B images in the
                output type: the velocity that this step's heads describe, integrated exactly to sigma 0. After the
                first step that is, up to rounding, the image of `num_inference_steps=1`. A GPU runs the first step once
                more for its preview, and gives no other. Like `callback_on_step_end`, it must not call this pipeline.
            max_previews: most previews, spread evenly over the steps, since each is decoded; None gives all.
            generator: in place of `seed`, a `torch.Generator` on the CPU or a list of B. Only its initial seed is used,
                so numbers drawn from it before make no difference.
            latents: in place of `seed`, the noise itself, [B, N, 64], packed as in diffusers.
            prompt_embeds: in place of `prompt`, text states [P, T, Dt] of P prompts, without padding for Qwen-Image.
            pooled_prompt_embeds: with `prompt_embeds` for FLUX, CLIP's pooled vectors [P, Dp].
            loras: names of LoRAs that `load_lora` has read, with a scale for each; they apply to the whole batch.
            negative_prompt: what to guide the images away from, for a straight student of Qwen-Image; one for all
                prompts or a list of one each. It costs a second run of the backbone in each step; None does not guide.
            true_cfg_scale: scale of that guidance; None is the bundle's. 1 or less does not guide.
            others: diffusers' other arguments, which are rejected unless they are None.

        Raises:
            RequestError: an argument is wrong and nothing was run, or this pipeline's own callback called it.
            EngineError: an engine failed, or the latents are not finite.
            BundleError: a part must be loaded for this call, and the bundle was replaced since it was opened.
        """
        started = time.perf_counter()
        refuse_others(others)
        check_callback("callback_on_step_end", callback_on_step_end, "latents")
        check_callback("callback_on_preview", callback_on_preview, "images")
        check_max_previews(max_previews, callback_on_preview)
        request = check_request(
            self.bundle.manifest,
            prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            seed,
            num_images_per_prompt,
            max_sequence_length,
            output_type,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            loras=loras,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
        )
        watch = Stopwatch()
        with self._calls.enter("a pipeline"):
            prepared = self._prepare(request, watch)
            embeddings, warnings = self._encode(request, prepared, watch)
            for warning in warnings:
                _log.warning(warning)
            wanted = preview_steps(request.num_inference_steps, max_previews) if callback_on_preview else frozenset()
            latents, pixels = self._denoise(
                request, prepared, embeddings, watch, callback_on_step_end, callback_on_preview, wanted
            )
            images = self._decode(request, latents, pixels, watch)
        timings = watch.ms | {"total": (time.perf_counter() - started) * 1e3}
        return PipelineOutput(images, request.seed, warnings, timings)

    def load_lora(self, file: str | Path, name: str | None = None) -> str:
        """Read a LoRA, so that calls can name it in `loras`. It changes nothing by itself.

        Args:
            file: a .safetensors file of any common tool, or one that `arcflow lora convert` wrote.
            name: what calls will call it; None is the file's name without its ending.

        Returns:
            The name.

        Raises:
            LoraError: the file cannot be read, or does not fit the bundle's slots; the message names the layer.
            RequestError: the name is taken.
        """
        path = Path(file)
        name = path.stem if name is None else name
        self._loras.add(name, open_lora(path, name, self.bundle.manifest))
        return name

    def unload_lora(self, name: str) -> None:
        """Forget a LoRA. Calls that are running with it finish unchanged.

        Raises:
            RequestError: no LoRA has this name.
        """
        self._loras.remove(name)

    @property
    def loras(self) -> tuple[str, ...]:
        """Names of the loaded LoRAs."""
        return self._loras.names

    def _prepare(self, request: Request, watch: Stopwatch) -> PreparedLoras:
        """The inputs of the request's LoRAs."""
        if not request.loras:
            return NO_LORAS
        with watch("loras"):
            return self._loras.get(request.loras)

    def _encode(
        self, request: Request, loras: PreparedLoras, watch: Stopwatch
    ) -> tuple[dict[str, Embeddings], tuple[str, ...]]:
        """The embeddings of the distinct prompts, then negative prompts, in order; and the warnings to show the caller.

        A prompt whose embeddings are cached is neither tokenised nor encoded.
        """
        given = dict(request.embeddings or {})
        texts = [] if request.embeddings is not None else list(request.prompts)
        texts += request.negative_prompts or ()
        if not texts:
            return given, request.warnings
        length, key = request.max_sequence_length, loras.text_key
        embeddings = {p: self._cache.get(p, length, key) for p in texts}
        unknown = [p for p, e in embeddings.items() if e is None]
        with watch("tokenize"):
            tokens = {p: self.tokenizer.tokenize(p, length) for p in unknown}
        with watch("encode"):
            for p, e in encode_prompts(self._parts, self.bundle.manifest, tokens, loras).items():
                self._cache.put(p, length, e, key)
                embeddings[p] = e
        known = given | {p: e for p, e in embeddings.items() if e is not None}
        return known, request.warnings + tuple(w for e in known.values() for w in e.warnings)

    def _denoise(
        self,
        request: Request,
        loras: PreparedLoras,
        embeddings: dict[str, Embeddings],
        watch: Stopwatch,
        callback: StepCallback | None,
        on_preview: PreviewCallback | None,
        previewed: frozenset[int],
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute the modulation and run every step: latents [B, N, 64] float32, and pixels if a denoiser ran.

        `on_preview` is called after the steps in `previewed`.
        """
        m = self.bundle.manifest
        # The denoiser generates the noise on its device, so noise given by the caller takes the loop on the host.
        denoiser = self._denoiser if request.latents is None else None
        modulation = self._modulation(request, loras, embeddings, watch) if denoiser is None else None
        noise = packed_noise(m, request, watch) if denoiser is None else None
        with watch("rotary"):
            rotary = image_rotary(m.rotary, m.family, m.rotary_dtype, *grid_of(m, request))
            groups = groups_of(m, request, request.prompts, embeddings)
            negative: Negative | None = None
            if (n := request.negative_prompts) is not None:
                negative = Negative(groups_of(m, request, n, embeddings), request.true_cfg_scale)
        pixels: np.ndarray | None = None

        def preview(step: int, latents: np.ndarray, pixels: np.ndarray | None = None) -> None:
            assert on_preview is not None, "previews are made on demand"
            if step not in previewed:
                return
            check_finite(latents, m.parts["backbone"].precision)
            with watch("preview"):
                images = self._decode(request, latents, pixels, Stopwatch())
            on_preview(step, images)

        if modulation is not None and noise is not None:
            with self._parts.use("backbone") as run:
                inputs = loras.of("backbone")
                with_loras = (lambda given: run({**given, **inputs})) if inputs else run
                on_end = preview if previewed else None
                rest = (noise, modulation, rotary, schedule_of(m, request), watch, callback, on_end)
                if m.sampler == "linear":
                    latents = denoise_straight(with_loras, groups, negative, *rest)
                else:
                    latents = denoise(with_loras, groups, *rest)
        elif denoiser is not None:
            jobs = jobs_of(m, request, loras, groups, negative, self._conditioner)
            if previewed:
                first = [(images, first_step(job)) for images, job in jobs]
                with watch("preview"):
                    found = denoise_on_device(denoiser, first, Stopwatch())
                previewed = frozenset([0])
                preview(0, *found)
            latents, pixels = denoise_on_device(denoiser, jobs, watch, callback)
        check_finite(latents, m.parts["backbone"].precision)
        return latents, pixels

    def _modulation(
        self, request: Request, loras: PreparedLoras, embeddings: dict[str, Embeddings], watch: Stopwatch
    ) -> np.ndarray:
        """The modulation [S, U, M] of the U distinct prompts, or [S, 1, M]."""
        with watch("condition"):
            pooled = [e.pooled for e in embeddings.values() if e.pooled is not None]
            return self._conditioner.modulation(
                self._parts,
                *conditioning_of(self.bundle.manifest, request),
                join(pooled) if pooled else None,
                loras,
            )

    def _decode(
        self, request: Request, latents: np.ndarray, pixels: np.ndarray | None, watch: Stopwatch
    ) -> list[Image.Image] | np.ndarray:
        """Convert latents, or pixels [B, H, W, 3] uint8 if a denoiser decoded them, to the requested output type."""
        if request.output_type == "latents":
            return latents
        with watch("decode"):
            if pixels is None:
                pixels = decode_latents(self._parts, latents, request.height_px, request.width_px)
            check_not_flat(pixels, self.bundle.manifest.parts["vae_decoder"].precision)
            return to_pil(pixels) if request.output_type == "pil" else to_float(pixels)

    def warm_up(
        self,
        shapes: Sequence[tuple[int, int, int]],
        num_inference_steps: int | None = None,
        text_tokens: int | None = None,
        lora_ranks: Sequence[int] = (),
        negative_text_tokens: int | None = None,
    ) -> None:
        """Do the one-time work for images of these shapes: capture CUDA graphs on a GPU; nothing on a CPU.

        Args:
            shapes: (batch, height, width) of each; height and width in pixels.
            num_inference_steps: number of backbone runs; None is the bundle's.
            text_tokens: number of text states T; None is the bundle's max_sequence_length, to which FLUX pads. With
                Qwen-Image, T is the length of the prompt, and each length has a graph of its own.
            lora_ranks: ranks of LoRAs that requests will have, besides those without a LoRA.
            negative_text_tokens: as `text_tokens`, for the negative prompts; None if requests have none.

        Raises:
            RequestError: a shape, a rank or a number of tokens is out of the bundle's range, or it has no guidance by
                negative prompts.
            EngineError: an engine does not accept a shape, or memory ran out.
        """
        m, away = self.bundle.manifest, negative_text_tokens
        requests = []
        for batch, height, width in shapes:
            sizes = (height, width, num_inference_steps, None, 0, 1)
            requests.append(check_request(m, [""] * batch, *sizes, text_tokens, "pil"))
            if away is not None:
                check_request(m, [""] * batch, *sizes, away, "pil", negative_prompt="")
        sets = [NO_LORAS, *(blank_loras(m, rank) for rank in lora_ranks)]
        if self._denoiser is None:
            return
        self._calls.check("warm_up()")
        # The largest shape first, so that the shared workspace is allocated only once.
        for request in sorted(requests, key=lambda r: -r.batch * r.height_px * r.width_px):
            groups = groups_of(m, request, request.prompts, {"": blank_text(m, request.max_sequence_length)})
            negative: Negative | None = None
            if away is not None:
                others = groups_of(m, request, request.prompts, {"": blank_text(m, away)})
                negative = Negative(others, MAX_TRUE_CFG_SCALE)  # the graph serves every scale
            for loras in sets:
                for _, job in jobs_of(m, request, loras, groups, negative, self._conditioner):
                    self._denoiser.warm_up(job)

    def clear_cache(self) -> None:
        """Drop the cached tokens, text embeddings and modulations of earlier prompts."""
        self.tokenizer.clear_cache()
        self._cache.clear()
        self._conditioner.clear_cache()
        if self._denoiser is not None:
            self._denoiser.clear_cache()

    def close(self) -> None:
        """Free every engine; calls afterwards raise `EngineError`. Closing twice is allowed.

        Raises:
            RequestError: this pipeline's own callback called it.
        """
        self._calls.check("close()")
        if self._denoiser is not None:
            self._denoiser.close()
        self._parts.close()
        self.clear_cache()
        self._loras.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
