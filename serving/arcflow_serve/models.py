"""The loaded bundles: name -> a pipeline that every lane uses, loaded again after an engine has failed."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.families import facts
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.signatures import encoder_of
from arcflow_runtime.errors import RequestError
from arcflow_runtime.generate.pipeline import Pipeline
from arcflow_runtime.generate.request import Request, check_request
from arcflow_runtime.generate.text import PromptTokenizer
from arcflow_runtime.hub.bundles import find_bundle
from arcflow_serve.errors import UNAVAILABLE, ServiceError
from arcflow_serve.settings import Settings

_log = logging.getLogger("arcflow.serve")
#: A bundle that cannot be loaded is tried again after this time.
RETRY_S = 5.0
#: After this many failures in a row, the pipeline is loaded again: its engines may be damaged.
MAX_FAILURES = 3
#: After this many loads in a row that fail, the service reports that it is not healthy.
MAX_LOAD_FAILURES = 3

Load = Callable[[], Pipeline]


class Model:
    """One bundle under its name; safe to use from several threads.

    A pipeline that is retired is closed when its last user leaves, and only then another one is loaded, because two may
    not fit into memory.
    """

    def __init__(self, name: str, bundle: Bundle, load: Load, loras: Sequence[str] = ()) -> None:
        """`load` opens the pipeline with the LoRAs named in `loras`; the methods `load` and `restore` call it."""
        self.name = name
        self.manifest = bundle.manifest
        self.created = int(time.time())
        #: Names of the LoRAs that requests may use.
        self.loras = tuple(loras)
        self._tokenizer = PromptTokenizer(bundle)
        family = bundle.manifest.family
        part = encoder_of(family, "encoder_hidden_states")
        assert part is not None, "every family has text states"
        self._text_encoder, self._pads = part, facts(family).text == "clip-t5"
        self._load = load
        self._changed = threading.Condition()
        self._pipeline: Pipeline | None = None
        self._users: dict[Pipeline, int] = {}
        self._error: str | None = "it is not loaded yet"
        self._load_failures = 0
        self._failures = 0
        self._retry_at = 0.0
        self._loading_since: float | None = None
        self._closed = False
        #: What `load` took.
        self.first_load_s = 0.0

    @property
    def loaded(self) -> bool:
        """True if requests can be generated."""
        return self._pipeline is not None

    @property
    def loading(self) -> bool:
        """True while requests should wait: it is loaded again, or will be."""
        return self._pipeline is None and self._error is None

    @property
    def loading_s(self) -> float:
        """For how long it has been loaded again; 0 if it is not."""
        since = self._loading_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def due(self) -> bool:
        """True if `restore` would load it now."""
        there = self._pipeline is not None or self._loading_since is not None or self._closed
        return not (there or self._users or time.monotonic() < self._retry_at)

    @property
    def trouble(self) -> str | None:
        """Why the model seems beyond repair, or None."""
        return self._error if self._load_failures >= MAX_LOAD_FAILURES else None

    def check(
        self,
        prompt: str,
        size_px: tuple[int, int] | None,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        seed: int | None,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
        loras: Mapping[str, float] | None = None,
    ) -> Request:
        """Check a request against the bundle, as the pipeline does; nothing is run. `size_px` is width and height.

        Raises:
            RequestError: a field is out of range, or a LoRA is not loaded; the message begins with the field's name.
        """
        for name in loras or {}:
            if name not in self.loras:
                has = f"it has {', '.join(map(repr, self.loras))}" if self.loras else "it has none"
                raise RequestError(
                    f"loras must name LoRAs that this service has loaded, got {name[:60]!r}; {has}. A LoRA can also be "
                    "merged into a bundle, with arcflow export --lora"
                )
        width, height = size_px or (None, None)
        # One image at a time: the service batches pictures itself, so the bundle's batch does not limit a request.
        return check_request(
            self.manifest,
            prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            seed,
            1,
            None,
            "pil",
            loras=loras,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
        )

    def tokens(self, prompt: str) -> tuple[int, tuple[str, ...]]:
        """The number of text tokens of a prompt, padding not counted, and warnings if it is cut."""
        text = self.manifest.text
        tokens = self._tokenizer.tokenize(prompt, text.max_sequence_length)
        ids = tokens.ids[self._text_encoder]
        if self._pads:
            return int(np.count_nonzero(ids != text.t5_pad_token_id)), tokens.warnings
        return ids.size - text.drop_tokens, tokens.warnings

    @contextmanager
    def use(self) -> Iterator[Pipeline]:
        """The pipeline, for one call; waits while it is loaded again.

        Raises:
            ServiceError: it could not be loaded again; that will be tried once more.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.loading)
            if self._pipeline is None:
                message = f"model {self.name!r} cannot be used now: {self._error}; try again later"
                raise ServiceError(UNAVAILABLE, "model_unavailable", message, retry_after_s=math.ceil(RETRY_S))
            pipeline = self._pipeline
            self._users[pipeline] = self._users.get(pipeline, 0) + 1
        try:
            yield pipeline
        finally:
            with self._changed:
                self._leave(pipeline)

    def succeeded(self) -> None:
        """Note that a call succeeded."""
        self._failures = 0

    def failed(self, for_memory: bool) -> None:
        """Note that a call with a single picture failed; too many in a row retire the pipeline.

        Calls that ran out of memory are not counted: clients could otherwise have the bundle loaded again and again.
        """
        with self._changed:
            self._failures += not for_memory
            pipeline = self._pipeline
            if pipeline is None:
                return
            # What the failed call left in the cache of text states may be damaged.
            pipeline.clear_cache()
            if self._failures >= MAX_FAILURES:
                _log.warning("model %s is loaded again: %d calls in a row failed", self.name, self._failures)
                self._retire()

    def abandon(self, pipeline: Pipeline) -> None:
        """Give up a pipeline without closing it: one of its calls does not return, and closing would wait for it."""
        with self._changed:
            self._users.pop(pipeline, None)
            if pipeline is self._pipeline:
                _log.warning("model %s is loaded again: a call did not return", self.name)
                self._retire(close=False)

    def load(self) -> None:
        """Load the pipeline for the first time.

        Raises:
            ArcFlowError: it cannot be loaded.
        """
        started = time.monotonic()
        self._adopt(self._load())
        self.first_load_s = time.monotonic() - started

    def restore(self) -> None:
        """Load the pipeline if there is none, its predecessor is closed, and the last attempt was not just now."""
        with self._changed:
            if not self.due:
                return
            self._loading_since = time.monotonic()
        try:
            pipeline, error = self._load(), None
        except Exception as e:
            # Whatever it is: requests wait for the end of this attempt.
            pipeline, error = None, str(e) or type(e).__name__
            _log.error("model %s cannot be loaded: %s", self.name, error)
        with self._changed:
            self._loading_since = None
            if self._closed:
                if pipeline is not None:
                    pipeline.close()
                return
            if pipeline is not None:
                self._adopt(pipeline)
            self._error = error
            self._failures = 0
            self._load_failures = 0 if error is None else self._load_failures + 1
            self._retry_at = time.monotonic() + RETRY_S
            self._changed.notify_all()

    def close(self) -> None:
        """Free the pipeline; `use` raises from now on."""
        with self._changed:
            if self._pipeline is not None:
                self._retire()
            self._closed, self._error = True, "the service is shutting down"
            self._changed.notify_all()

    def _adopt(self, pipeline: Pipeline) -> None:
        with self._changed:
            self._pipeline, self._error = pipeline, None
            # A prompt that it has tokenised is then not tokenised again to count its tokens.
            self._tokenizer = pipeline.tokenizer

    def _retire(self, close: bool = True) -> None:
        pipeline, self._pipeline, self._error, self._retry_at = self._pipeline, None, None, 0.0
        assert pipeline is not None, "only a loaded pipeline is retired"
        if close and not self._users.get(pipeline):
            pipeline.close()

    def _leave(self, pipeline: Pipeline) -> None:
        if pipeline not in self._users:  # it was abandoned
            return
        self._users[pipeline] -= 1
        if not self._users[pipeline]:
            del self._users[pipeline]
            if pipeline is not self._pipeline:
                pipeline.close()


def open_models(paths: Sequence[Path], settings: Settings) -> dict[str, Model]:
    """Load bundles; each is named after its directory or its name on the hub, and the first is the default.

    Raises:
        BundleError: a bundle cannot be opened.
        EngineError: the backend cannot run a bundle.
        LoraError: a LoRA cannot be read, or does not fit a bundle's slots.
        RequestError: two bundles or two LoRAs have the same name, a name is not text, or there are LoRAs but no bundle
            with slots.
        SourceError: a bundle on the hub cannot be downloaded.
    """
    models = describe_models(paths, settings)
    for model in models.values():
        model.load()
    return models


def describe_models(paths: Sequence[Path], settings: Settings) -> dict[str, Model]:
    """The models of `open_models`, not loaded: they can check requests, and generate nothing.

    Raises:
        BundleError: a bundle cannot be opened.
        RequestError: as for `open_models`.
    """
    models: dict[str, Model] = {}
    for given in paths:
        found = find_bundle(given)
        path, name = found.path, found.name
        if name in models:
            raise RequestError(f"bundles must have different names, got {name!r} twice; rename one, or link to it")
        if not name.isprintable():
            # Replies and metrics have the name.
            raise RequestError(f"a bundle's name must be printable text, got {name!r}; rename it, or link to it")

        bundle = Bundle.open(path)
        files = settings.loras if bundle.manifest.slots() else ()

        def load(path: Path = path, bundle: Bundle = bundle, files: tuple[Path, ...] = files) -> Pipeline:
            pipeline = Pipeline.load(path, settings.backend, settings.memory, threads=settings.engine_threads)
            try:
                for file in files:
                    pipeline.load_lora(file)
                _warm_up(pipeline, bundle, settings)
            except BaseException:
                pipeline.close()
                raise
            return pipeline

        models[name] = Model(name, bundle, load, [file.stem for file in files])
    check_loras(settings.loras, [model.manifest for model in models.values()])
    return models


def check_loras(files: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Check the names of the LoRAs that requests may use, and that a bundle can take them; no file is read.

    Raises:
        RequestError: two have the same name, or no bundle has slots.
    """
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"LoRAs must have different file names, got {', '.join(twice)} twice; rename one")
    if files and not any(manifest.slots() for manifest in manifests):
        raise RequestError(
            "--lora needs a bundle with LoRA slots, and none has any; export with --lora-slots, or merge with --lora"
        )


def _warm_up(pipeline: Pipeline, bundle: Bundle, settings: Settings) -> None:
    """Generate every size with every batch size once, on a GPU with a CUDA graph.

    Raises:
        RequestError: the bundle has no such size.
    """
    counts = range(1, min(settings.max_batch, bundle.manifest.ranges.batch.max) + 1)
    shapes = [(count, height, width) for width, height in settings.warm_up for count in counts]
    pipeline.warm_up(shapes)
    for count, height, width in shapes:
        pipeline([""] * count, height=height, width=width, seed=list(range(count)))
    pipeline.clear_cache()
