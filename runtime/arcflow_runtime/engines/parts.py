"""Hold a bundle's engines for the pipeline: part name -> a function that runs it.

The memory mode says which engines stay loaded. The others are loaded for each use and freed after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Part
from arcflow_runtime.engines.base import Backend, Engine, StreamedEngine, UnloadableEngine, UnloadingBackend
from arcflow_runtime.engines.modes import MemoryMode, keeps
from arcflow_runtime.errors import EngineError
from arcflow_runtime.maths.dtypes import cast

Inputs = Mapping[str, np.ndarray]
Run = Callable[[Inputs], dict[str, np.ndarray]]
RunAll = Callable[[Sequence[Inputs]], Iterator[dict[str, np.ndarray]]]


class Parts:
    """The engines of one bundle; safe to use from several threads.

    A part that the mode keeps is loaded on first use and stays loaded. Any other part is loaded for each use and let go
    after it, and only one of those is in memory at a time: other threads wait.
    """

    def __init__(self, bundle: Bundle, backend: Backend, memory: MemoryMode) -> None:
        self._bundle = bundle
        self._backend = backend
        self.memory: MemoryMode = memory
        self._engines: dict[str, Engine] = {}
        #: Engines whose weights were unloaded; their compiled kernels stay.
        self._unloaded: dict[str, UnloadableEngine] = {}
        self._closed = False
        self._lock = threading.Lock()
        #: Held while a part that is not kept is in use. It is taken before `_lock`.
        self._turn = threading.Lock()

    def keeps(self, part: str) -> bool:
        """True if `part` stays loaded once it was used."""
        return keeps(self.memory, part)

    def open_kept(self) -> None:
        """Load now, rather than on first use, every part that stays loaded.

        Raises:
            EngineError: a part cannot be loaded; those already loaded are freed.
        """
        try:
            for part in filter(self.keeps, self._bundle.manifest.parts):
                self._kept(part)
        except BaseException:
            self.close()
            raise

    def use(self, part: str) -> AbstractContextManager[Run]:
        """A context that yields a function to run `part`. It casts its inputs to the dtypes that the graph expects.

        The inputs may include those of the part's LoRA slots.

        Raises:
            EngineError: the part cannot be loaded, or `close` was called.
            BundleError: the part does not stay loaded, and the bundle was replaced since it was opened.
        """
        spec = self._bundle.manifest.parts[part]
        if self.keeps(part):
            return nullcontext(partial(_run, self._kept(part), spec))
        return self._run_once(part, spec)

    @contextmanager
    def use_all(self, part: str) -> Iterator[RunAll]:
        """Like `use`, with a function that runs `part` on several sets of inputs; see `StreamedEngine.run_all`.

        Raises:
            EngineError: the part cannot be loaded, or `close` was called.
        """
        spec = self._bundle.manifest.parts[part]
        with self.borrow(part) as engine:
            yield partial(_run_all, engine, spec)

    def borrow(self, part: str) -> AbstractContextManager[Engine]:
        """Like `use`, with the engine itself.

        Raises:
            EngineError: the part cannot be loaded, or `close` was called.
        """
        return nullcontext(self._kept(part)) if self.keeps(part) else self._opened(part)

    def close(self) -> None:
        """Close every engine; using a part afterwards raises `EngineError`. Calling it twice is allowed."""
        with self._turn, self._lock:
            self._closed = True
            for engine in (*self._engines.values(), *self._unloaded.values()):
                engine.close()
            self._engines.clear()
            self._unloaded.clear()

    @contextmanager
    def _run_once(self, part: str, spec: Part) -> Iterator[Run]:
        with self._opened(part) as engine:
            yield partial(_run, engine, spec)

    @contextmanager
    def _opened(self, part: str) -> Iterator[Engine]:
        with self._turn:
            self._check_open()
            self._bundle.check_unchanged()
            engine = self._bring(part)
            try:
                # Checked again, in case the bundle was replaced while the part was being loaded.
                self._bundle.check_unchanged()
                yield engine
            finally:
                self._let_go(part, engine)

    def _bring(self, part: str) -> Engine:
        """Load a part that does not stay loaded, or only its weights if the rest of it is still there."""
        if (engine := self._unloaded.pop(part, None)) is not None:
            try:
                engine.load_weights()
            except BaseException:
                engine.close()
                raise
            return engine
        if self.memory == "balanced" and isinstance(self._backend, UnloadingBackend):
            return self._backend.open_unloadable(self._bundle, part)
        return self._backend.open(self._bundle, part)

    def _let_go(self, part: str, engine: Engine) -> None:
        """Free the weights of a part, and in "low" or where its library cannot do that alone, all of it."""
        unloaded = False
        try:
            if self.memory == "balanced" and isinstance(engine, UnloadableEngine):
                unloaded = engine.unload_weights()
                if unloaded:
                    self._unloaded[part] = engine
        finally:
            if not unloaded:
                engine.close()

    def _kept(self, part: str) -> Engine:
        with self._lock:
            self._check_open()
            if part not in self._engines:
                self._engines[part] = self._backend.open(self._bundle, part)
            return self._engines[part]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this pipeline is closed; load it again with Pipeline.load")


def _run(engine: Engine, part: Part, inputs: Inputs) -> dict[str, np.ndarray]:
    return engine.run(_cast(part, inputs))


def _run_all(engine: Engine, part: Part, batches: Sequence[Inputs]) -> Iterator[dict[str, np.ndarray]]:
    if isinstance(engine, StreamedEngine):
        return engine.run_all([_cast(part, inputs) for inputs in batches])
    return (_run(engine, part, inputs) for inputs in batches)


def _cast(part: Part, inputs: Inputs) -> dict[str, np.ndarray]:
    found = {spec.name: cast(inputs[spec.name], spec.dtype) for spec in part.inputs}
    if len(inputs) > len(found):
        found |= {name: cast(inputs[name], dtype) for name, dtype in part.slot_dtypes.items() if name in inputs}
    return found
