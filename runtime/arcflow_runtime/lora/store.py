"""The LoRAs of a pipeline by name, and a bounded cache of prepared ones: names and scales -> `PreparedLoras`."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.errors import RequestError
from arcflow_runtime.lora.prepare import NO_LORAS, PreparedLoras, SetKey, prepare
from arcflow_runtime.lora.slots import FittedLora

#: Prepared sets that are kept, and their bytes. A LoRA of rank 16 for all linears of FLUX takes 125 MiB in bfloat16.
CACHED_SETS = 16
CACHED_BYTES = 2 << 30


class LoraStore:
    """Loaded LoRAs by name; safe to use from several threads. A set that a request has got stays valid."""

    def __init__(self, manifest: Manifest, sets: int = CACHED_SETS, nbytes: int = CACHED_BYTES) -> None:
        self._manifest, self._sets, self._bytes = manifest, sets, nbytes
        self._loras: dict[str, tuple[int, FittedLora]] = {}
        self._prepared: OrderedDict[SetKey, PreparedLoras] = OrderedDict()
        self._pending: dict[SetKey, Future[PreparedLoras]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded LoRAs, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._loras)

    def add(self, name: str, lora: FittedLora) -> None:
        """Add a LoRA.

        Raises:
            RequestError: the name is taken.
        """
        with self._lock:
            if name in self._loras:
                raise RequestError(f"name must be new, got {name!r}, which is loaded; call unload_lora({name!r}) first")
            self._loras[name] = (next(self._numbers), lora)

    def remove(self, name: str) -> None:
        """Remove a LoRA and every prepared set that has it.

        Raises:
            RequestError: no LoRA has this name.
        """
        with self._lock:
            number, _ = self._find(name)
            del self._loras[name]
            for key in [key for key in self._prepared if any(number == other for other, _ in key)]:
                del self._prepared[key]

    def get(self, loras: Sequence[tuple[str, float]]) -> PreparedLoras:
        """The prepared set of these LoRAs with their scales; made on first use.

        Raises:
            RequestError: a name is not loaded, or the LoRAs cannot be joined; see `prepare`.
        """
        if not loras:
            return NO_LORAS
        with self._lock:
            found = [(*self._find(name), scale) for name, scale in loras]
            # Sorted, so that the order in which a caller names the LoRAs makes no difference.
            found.sort(key=lambda item: item[0])
            key = tuple((number, scale) for number, _, scale in found)
            if key in self._prepared:
                self._prepared.move_to_end(key)
                return self._prepared[key]
            pending = self._pending.get(key)
            own: Future[PreparedLoras] = Future()
            if pending is None:
                self._pending[key] = own
        return self._make(key, found, own) if pending is None else pending.result()

    def _make(
        self, key: SetKey, found: list[tuple[int, FittedLora, float]], own: Future[PreparedLoras]
    ) -> PreparedLoras:
        """Prepare a set, while other threads get other sets, or wait for this one in `own`."""
        try:
            made = prepare(self._manifest, found)
        except BaseException as e:
            own.set_exception(e)
            with self._lock:
                del self._pending[key]
            raise
        own.set_result(made)
        with self._lock:
            del self._pending[key]
            loaded = {number for number, _ in self._loras.values()}
            if loaded.issuperset(number for number, _ in key):  # none was removed meanwhile
                self._prepared[key] = made
                self._trim()
        return made

    def clear(self) -> None:
        """Drop every LoRA and every prepared set."""
        with self._lock:
            self._loras.clear()
            self._prepared.clear()

    def _find(self, name: str) -> tuple[int, FittedLora]:
        if name not in self._loras:
            known = ", ".join(map(repr, self._loras)) or "none"
            raise RequestError(f"loras must be names of loaded LoRAs ({known}), got {name!r}; call load_lora first")
        return self._loras[name]

    def _trim(self) -> None:
        """Drop the least recently used sets beyond the limits; the newest stays, whatever its size."""
        while len(self._prepared) > 1 and (
            len(self._prepared) > self._sets or sum(p.nbytes for p in self._prepared.values()) > self._bytes
        ):
            self._prepared.popitem(last=False)
