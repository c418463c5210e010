"""The denoiser on a GPU: a `DenoiseJob` -> latents and images, with one launch of a CUDA graph per job.

It keeps a bounded number of plans, one per shape. Made by the GPU backends and called by the pipeline.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import MODULATION
from arcflow_runtime.engines.base import Engine
from arcflow_runtime.engines.denoiser import Denoised, DenoiseJob, OnStep
from arcflow_runtime.engines.modulation import ModulationCache
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.arrays import Modulation, PlanKey, conditioner_starts, modulation_source
from arcflow_runtime.gpu.buffers import Buffers
from arcflow_runtime.gpu.device import KernelLauncher
from arcflow_runtime.gpu.engine import Context, DeviceEngine, Shapes
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.lane import Lane, OutOfDeviceMemory
from arcflow_runtime.gpu.loras import LoraArenas
from arcflow_runtime.gpu.plan import GraphPlan
from arcflow_runtime.gpu.shapes import DenoiseShape, backbone_inputs, conditioner_inputs, decoder_inputs

_log = logging.getLogger("arcflow")

#: Number of plans kept besides those that were warmed up; the buffers of one for a 1024 px FLUX image take about 40 MB.
MAX_PLANS = 8

#: (part, shapes of its inputs) -> None if the part's engine accepts them, else the reason why not.
ShapeCheck = Callable[[str, Shapes], str | None]


class DeviceDenoiser:
    """Implements `Denoiser` for every backend that runs parts on a device.

    Each shape is one CUDA graph, with the conditioner in it if that stays loaded. If it does not ("balanced"), the
    modulation comes from the host, where it is cached. If backbone and decoder do not stay loaded either ("low"), each
    is loaded for its stage and freed after it, without a graph; only the buffers stay.
    """

    def __init__(
        self, bundle: Bundle, parts: Parts, lane: Lane, check_shapes: ShapeCheck, max_plans: int = MAX_PLANS
    ) -> None:
        self._bundle, self._parts, self._lane, self._check_shapes = bundle, parts, lane, check_shapes
        self._max_plans = max_plans
        self._plans: OrderedDict[PlanKey, GraphPlan] = OrderedDict()
        #: Each of them is room for one plan more.
        self._warmed: set[PlanKey] = set()
        self._warming = False
        self._arenas = LoraArenas(lane, bundle.manifest, ("backbone", "conditioner"))
        self._kernels: KernelLauncher | None = None
        self._modulations = ModulationCache()
        self._logged: set[str] = set()
        self._closed = False
        self._running: PlanKey | None = None
        # Reentrant, because loading a part during a job may call `make_room`.
        self._lock = threading.RLock()
        lane.make_room = self.make_room

    def denoise(self, job: DenoiseJob, watch: Stopwatch, on_step: OnStep | None = None) -> Denoised:
        """Run a job, in several pieces if the engines accept fewer images at once; see `Denoiser.denoise`."""
        batch = len(job.texts)
        most, steps_at_once = self._fit(job)
        pieces = [slice(i, min(i + most, batch)) for i in range(0, batch, most)]
        # By step, the latents of the pieces so far. The pieces run one after the other, and `on_step` gets the whole
        # batch, so it is called while the last piece runs.
        by_step: list[list[np.ndarray]] = [[] for _ in job.timesteps]
        done = []
        for piece in pieces:
            part = _piece(job, piece)

            def after(step: int, latents: np.ndarray, last: bool = piece is pieces[-1]) -> None:
                by_step[step].append(latents)
                if last and on_step is not None:
                    on_step(step, np.concatenate(by_step[step]))

            done.append(self._denoise(part, steps_at_once, watch, after if on_step is not None else None))
        if len(done) == 1:
            return done[0]
        pixels = [d.pixels for d in done if d.pixels is not None]
        return Denoised(np.concatenate([d.latents for d in done]), np.concatenate(pixels) if pixels else None)

    def warm_up(self, job: DenoiseJob) -> None:
        """Run the job twice, which enqueues it and then captures its graph; see `Denoiser.warm_up`."""
        if not self._parts.keeps("backbone"):
            return
        with self._lock:
            self._warming = True
            try:
                for _ in range(2):
                    self.denoise(job, Stopwatch())
            finally:
                self._warming = False

    def clear_cache(self) -> None:
        """See `Denoiser.clear_cache`."""
        self._modulations.clear()

    def make_room(self) -> bool:
        """Free the plans, which can be made again, except one that is running in this thread.

        Returns:
            False if there are none, or another thread is using one.
        """
        if not self._lock.acquire(blocking=False):  # its owner may be waiting for a lock of the caller
            return False
        try:
            others = [key for key in self._plans if key != self._running]
            if not others:
                return False
            _log.warning("out of GPU memory: the CUDA graphs of %d other shapes are dropped", len(others))
            for key in others:
                self._plans.pop(key).close()
            if self._running is None:
                self._arenas.release()
                self._lane.release_workspace()
            return True
        finally:
            self._lock.release()

    def close(self) -> None:
        """Free every plan; see `Denoiser.close`."""
        with self._lock:
            self._closed = True
            self._drop_plans(0)
            self._arenas.release()
            self._lane.release_workspace()

    def _denoise(self, job: DenoiseJob, steps_at_once: int, watch: Stopwatch, on_step: OnStep | None) -> Denoised:
        reported: list[int] = []

        def report(step: int, latents: np.ndarray) -> None:
            reported.append(step)
            if on_step is not None:
                on_step(step, latents)

        with self._lock:
            if self._closed:
                raise EngineError("this pipeline is closed; load it again with Pipeline.load")
            given_step = report if on_step is not None else None
            try:
                return self._run(job, steps_at_once, watch, given_step)
            except OutOfDeviceMemory:
                # A step that the caller has seen cannot be taken back.
                if reported or not self.make_room():
                    raise
            # After the `except`, so that nothing keeps the objects of the first run.
            return self._run(job, steps_at_once, watch, given_step)

    def _run(self, job: DenoiseJob, steps_at_once: int, watch: Stopwatch, on_step: OnStep | None) -> Denoised:
        """Run a job that the engines accept whole. If it fails, its plan is dropped."""
        modulation = self._modulation_source(job)
        given = self._condition(job, steps_at_once, watch) if modulation == "given" else None
        grid, texts = job.grid, job.texts
        size = DenoiseShape(len(texts), grid, texts[0].states.shape[1], len(job.timesteps))
        rank = self._arenas.rank(job.loras)
        away = 0 if job.negative is None else job.negative.texts[0].states.shape[1]
        plan = self._plan(PlanKey(size, job.pixels, modulation, rank, away), steps_at_once, job)
        with watch("stage"):
            plan.buffers.stage(job, given)
        try:
            if rank:
                with watch("loras"), self._lane.enter() as stream:
                    self._arenas.put(job.loras, rank, stream)
            self._running = plan.key
            if self._parts.keeps("backbone"):
                plan.run(on_step)
            else:
                plan.run_staged(lambda part: self._opened(part, plan.buffers.contexts[part]), on_step)
        except BaseException:
            # The plan may have enqueued or captured half of its work, so it is discarded.
            self._plans.pop(plan.key, None)
            plan.close()
            self._arenas.forget()
            raise
        finally:
            self._running = None
        if plan.obstacle is not None and plan.obstacle not in self._logged:
            self._logged.add(plan.obstacle)
            _log.warning("images are generated without a CUDA graph: %s", plan.obstacle)
        for stage, ms in plan.times_ms().items():
            watch.add(stage, ms)
        return plan.buffers.read()

    def _fit(self, job: DenoiseJob) -> tuple[int, int]:
        """The largest number of images per run, and of timesteps per run of the conditioner, that the engines accept.

        Raises:
            EngineError: they do not accept even one image of this size.
        """
        steps = len(job.timesteps)
        wrong: str | None = None
        for batch in range(len(job.texts), 0, -1):
            wrong = self._check_batch(job, batch)
            if wrong is None and job.table is not None:
                return batch, steps
            for at_once in range(steps, 0, -1) if wrong is None else ():
                wrong = self._check_shapes("conditioner", conditioner_inputs(self._bundle.manifest, batch, at_once))
                if wrong is None:
                    return batch, at_once
        raise EngineError(str(wrong))

    def _check_batch(self, job: DenoiseJob, batch: int) -> str | None:
        """Why the backbone or the decoder does not accept `batch` images of this job's size, or None if they do."""
        texts = [job.texts[0], *(() if job.negative is None else job.negative.texts[:1])]
        sizes = [DenoiseShape(batch, job.grid, text.states.shape[1], len(job.timesteps)) for text in texts]
        checks = [("backbone", backbone_inputs(self._bundle.manifest, size)) for size in sizes]
        if job.pixels:
            checks.append(("vae_decoder", decoder_inputs(self._bundle.manifest, sizes[0])))
        return next((wrong for check in checks if (wrong := self._check_shapes(*check)) is not None), None)

    def _modulation_source(self, job: DenoiseJob) -> Modulation:
        if job.table is not None and job.loras.of(MODULATION):
            return "given"  # a plan has the bundle's table built in, but not one that LoRAs changed
        return modulation_source(self._bundle.manifest, job.table is not None, self._parts.keeps("conditioner"))

    def _condition(self, job: DenoiseJob, steps_at_once: int, watch: Stopwatch) -> np.ndarray:
        """The modulation [S, b, M] or [S, 1, M] by way of the host; the results for the last inputs are cached.

        It is a table that LoRAs changed, or the conditioner computes it. The runs of the conditioner are those that a
        graph would make, so that the modulation has the same bits.
        """
        if job.table is not None:
            return job.table[:, None]
        slots = job.loras.of("conditioner")
        key = job.loras.key if slots else None
        inputs = {"timesteps": job.timesteps}
        pooled = [text.pooled for text in job.texts if text.pooled is not None]
        if pooled:
            inputs["pooled_projections"] = np.concatenate(pooled)
        if job.guidance is not None:
            inputs["guidance"] = np.full(len(job.texts), job.guidance, np.float32)
        with watch("condition"):
            if (cached := self._modulations.get(inputs, key)) is not None:
                return cached
            made: dict[int, np.ndarray] = {}
            with self._parts.use("conditioner") as run:
                for start in conditioner_starts(len(job.timesteps), steps_at_once):
                    steps = job.timesteps[start : start + steps_at_once]
                    made |= enumerate(run({**inputs, **slots, "timesteps": steps})["modulation"], start)
            modulation = np.stack([made[step] for step in range(len(job.timesteps))])
            self._modulations.put(inputs, modulation, key)
            return modulation

    def _plan(self, key: PlanKey, steps_at_once: int, job: DenoiseJob) -> GraphPlan:
        """The plan of a key, made on first use; the least recently used plan is dropped if there are too many."""
        if self._warming:
            self._warmed.add(key)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        self._drop_plans(self._max_plans + len(self._warmed) - 1)
        plan = self._plans[key] = self._make_plan(key, steps_at_once, job)
        return plan

    def _make_plan(self, key: PlanKey, steps_at_once: int, job: DenoiseJob) -> GraphPlan:
        manifest = self._bundle.manifest
        with self._lane.enter():
            if self._kernels is None:
                self._kernels = self._lane.device.kernels()
            buffers = Buffers(self._lane, manifest, key, steps_at_once, job, self._arenas)
            plan = GraphPlan(self._lane, key, buffers, self._kernels)
        try:
            if self._parts.keeps("backbone"):
                for part, shapes in plan.buffers.contexts.items():
                    plan.contexts[part] = made = []
                    for inputs in shapes:
                        made.append(self._context(part, inputs))
                with self._lane.enter():
                    plan.bind()
        except BaseException:
            plan.close()
            raise
        return plan

    def _context(self, part: str, inputs: Shapes) -> Context:
        with self._parts.borrow(part) as engine, self._lane.enter() as stream:
            return _device_engine(engine).context(inputs, stream)

    @contextmanager
    def _opened(self, part: str, shapes: Sequence[Shapes]) -> Iterator[Sequence[Context]]:
        """Load a part for one stage, with a context for each set of shapes, and free its memory afterwards."""
        contexts: list[Context] = []
        with self._parts.borrow(part) as engine:
            try:
                with self._lane.enter() as stream:
                    for inputs in shapes:
                        contexts.append(_device_engine(engine).context(inputs, stream))
                    if wanted := max(context.workspace_bytes for context in contexts):
                        workspace = self._lane.workspace(wanted, part)
                        for context in contexts:
                            context.set_workspace(workspace.address, workspace.nbytes)
                yield contexts
            finally:
                with self._lane.enter():
                    self._lane.settle()
                    for context in contexts:
                        context.close()
                    self._lane.release_workspace()

    def _drop_plans(self, keep: int) -> None:
        while len(self._plans) > keep:
            _, plan = self._plans.popitem(last=False)
            plan.close()


def _piece(job: DenoiseJob, piece: slice) -> DenoiseJob:
    """The part of a job with these images."""
    away = job.negative
    if away is not None:
        away = dataclasses.replace(away, texts=away.texts[piece])
    return dataclasses.replace(job, streams=job.streams[piece], texts=job.texts[piece], negative=away)


def _device_engine(engine: Engine) -> DeviceEngine:
    assert isinstance(engine, HostEngine), "a backend with a DeviceDenoiser opens only HostEngines"
    return engine.device_engine
