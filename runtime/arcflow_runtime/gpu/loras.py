"""LoRAs on a GPU: `PreparedLoras` -> inputs of the slots at fixed device addresses, so that captured graphs stay valid.

Ranks are padded with zeros to one of a few ranks. Each has an arena, whose addresses the graphs have built in. Other
LoRAs of the same rank take one copy on the device, from memory where the sets of recent requests are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from arcflow_runtime.disk.manifest import DType, LoraSlots, Manifest
from arcflow_runtime.gpu.device import Memory, Stream
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.layout import Layout
from arcflow_runtime.lora.prepare import PreparedLoras, SetKey
from arcflow_runtime.maths.dtypes import NUMPY

#: The ranks that arenas have; the largest is the bundle's. The first is also for requests without a LoRA, because an
#: engine has no rank 0.
RANKS = (8, 16, 32, 64, 128, 256, 512)
#: Sets that are kept on the device, and their bytes. One of rank 16 for all linears of FLUX takes 125 MiB in bfloat16.
DEVICE_SETS = 16
DEVICE_BYTES = 2 << 30


def padded_rank(slots: LoraSlots, ranks: Iterable[int]) -> int:
    """The smallest arena's rank that holds all of `ranks`."""
    largest = max(ranks, default=0)
    return min(slots.max_rank, next((rank for rank in RANKS if rank >= largest), slots.max_rank))


def pad_inputs(slots: LoraSlots, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of every slot of a part, with zeros for layers and ranks that `inputs` does not have."""
    ranks = [a.shape[1] * slots.rank_multiple for name, a in inputs.items() if name.endswith(".lora_a")]
    shapes = slots.shapes({}, padded_rank(slots, ranks))
    arrays = {name: np.zeros(shape, NUMPY[dtype]) for name, (shape, dtype) in shapes.items()}
    for name in arrays.keys() & inputs.keys():
        _fill(arrays[name], inputs[name])
    return arrays


def _fill(target: np.ndarray, source: np.ndarray) -> None:
    """Copy a factor [in, r, 8] or [r, 8, out] to the start of one of a larger rank, whose rest is zeros."""
    target[tuple(slice(n) for n in source.shape)] = source


@dataclass
class _Arena:
    """The inputs of all slots for one rank; `holds` is the set that was copied there last, or None."""

    memory: Memory
    holds: SetKey | None = None


class LoraArenas:
    """The arenas and the kept sets of one denoiser, for some of a bundle's parts; used by one thread at a time."""

    def __init__(
        self, lane: Lane, manifest: Manifest, parts: Iterable[str], sets: int = DEVICE_SETS, nbytes: int = DEVICE_BYTES
    ) -> None:
        found = manifest.slots()
        self._slots = {part: found[part] for part in parts if part in found}
        self._lane, self._limits = lane, (sets, nbytes)
        self._layouts: dict[int, Layout] = {}
        self._arenas: dict[int, _Arena] = {}
        self._sets: OrderedDict[tuple[int, SetKey], Memory] = OrderedDict()

    def rank(self, loras: PreparedLoras) -> int:
        """The rank of the arena for these LoRAs; 0 if the parts have no slots."""
        ranks = [rank for part in self._slots for rank in loras.ranks.get(part, {}).values()]
        return max((padded_rank(slots, ranks) for slots in self._slots.values()), default=0)

    def shapes(self, part: str, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the slots' inputs of one part; empty if it has no slots."""
        return {name: shape for name, (shape, _) in self._specs(part, rank).items()}

    def addresses(self, part: str, rank: int) -> dict[str, int]:
        """Device addresses of the slots' inputs of one part. They stay the same until `release`.

        Raises:
            OutOfDeviceMemory: there is not enough memory for the arena.
        """
        if part not in self._slots:
            return {}
        layout, base = self._layout(rank), self._arena(rank).memory.address
        return {name: base + layout[name].offset for name in self._specs(part, rank)}

    def put(self, loras: PreparedLoras, rank: int, stream: Stream) -> None:
        """Enqueue the copy of a set into the arena of `rank`, unless it is there already. The caller holds the lane.

        Raises:
            OutOfDeviceMemory: there is not enough memory for the arena or the set.
        """
        arena = self._arena(rank)
        if arena.holds == loras.key:
            return
        source = self._set(loras, rank, stream)
        arena.holds = None
        stream.copy(arena.memory.address, source.address, self._layout(rank).nbytes)
        arena.holds = loras.key

    def forget(self) -> None:
        """Copy every set again at its next use: after a failure it is unknown what the arenas hold."""
        for arena in self._arenas.values():
            arena.holds = None

    def release(self) -> None:
        """Free everything, after the stream is idle. No plan may use an arena's addresses afterwards."""
        with self._lane.enter():
            self._lane.settle()
            for memory in (*(arena.memory for arena in self._arenas.values()), *self._sets.values()):
                memory.close()
            self._arenas.clear()
            self._sets.clear()

    def _specs(self, part: str, rank: int) -> dict[str, tuple[tuple[int, ...], DType]]:
        return self._slots[part].shapes({}, rank) if part in self._slots else {}

    def _layout(self, rank: int) -> Layout:
        if rank not in self._layouts:
            # A layer has its slot in one part only (B14), so names are unique.
            specs = {name: spec for part in self._slots for name, spec in self._specs(part, rank).items()}
            self._layouts[rank] = Layout.of(specs)
        return self._layouts[rank]

    def _arena(self, rank: int) -> _Arena:
        if rank not in self._arenas:
            self._arenas[rank] = _Arena(self._lane.allocate(self._layout(rank).nbytes, f"LoRAs of rank {rank}"))
        return self._arenas[rank]

    def _set(self, loras: PreparedLoras, rank: int, stream: Stream) -> Memory:
        """The set in device memory; made on first use. The least recently used sets beyond the limits are freed."""
        key = (rank, loras.key)
        if key not in self._sets:
            nbytes = self._layout(rank).nbytes
            self._make_room(nbytes)
            self._sets[key] = self._upload(loras, rank, nbytes, stream)
        self._sets.move_to_end(key)
        return self._sets[key]

    def _make_room(self, nbytes: int) -> None:
        sets, limit = self._limits
        while self._sets and (
            len(self._sets) >= sets or nbytes + sum(memory.nbytes for memory in self._sets.values()) > limit
        ):
            self._lane.settle()  # the copy from the set may not have run yet
            self._sets.popitem(last=False)[1].close()

    def _upload(self, loras: PreparedLoras, rank: int, nbytes: int, stream: Stream) -> Memory:
        memory = self._lane.allocate(nbytes, f"LoRAs of rank {rank}")
        try:
            pinned = self._lane.allocate_pinned(nbytes, f"LoRAs of rank {rank}")
            try:
                pinned.array[:] = 0
                layout = self._layout(rank)
                for part in self._slots:
                    for name, array in loras.of(part).items():
                        _fill(layout[name].view(pinned.array[:nbytes]), array)
                stream.copy(memory.address, pinned.address, nbytes)
                stream.wait()
            finally:
                self._lane.settle()
                pinned.close()
        except BaseException:
            memory.close()
            raise
        return memory
