"""Draws with plans kept in a bounded cache: a `DenoiseJob` -> latents and pictures, one graph launch each."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import TensorSpec
from arcflow_runtime.engines.base import Engine
from arcflow_runtime.engines.denoiser import Denoised, DenoiseJob, OnStep
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.buffers import Buffers, Modulation, PlanKey
from arcflow_runtime.gpu.device import Kernels
from arcflow_runtime.gpu.engine import Context, DeviceEngine, Shapes
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.lane import Lane, OutOfDeviceMemory
from arcflow_runtime.gpu.plan import Plan
from arcflow_runtime.gpu.shapes import DenoiseShape, backbone_inputs, conditioner_inputs, decoder_inputs

_log = logging.getLogger("arcflow")

#: Plans kept; one of a 1024 px picture of FLUX has about 40 MB of buffers.
MAX_PLANS = 8

#: What is wrong with inputs of these shapes for a part's engine; None where it takes them.
Limits = Callable[[str, Shapes], str | None]


class DeviceDenoiser:
    """The denoiser of every backend that runs parts on a device (`Denoiser`).

    Where parts stay open, everything is one graph per shape. Where they do not (`low_memory`), each is opened for its
    stage and closed after it; only the buffers stay.
    """

    def __init__(self, bundle: Bundle, parts: Parts, lane: Lane, limits: Limits, max_plans: int = MAX_PLANS) -> None:
        self._bundle, self._parts, self._lane, self._limits = bundle, parts, lane, limits
        self._max_plans = max_plans
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self._kernels: Kernels | None = None
        self._logged: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def denoise(self, job: DenoiseJob, watch: Stopwatch, on_step: OnStep | None = None) -> Denoised:
        """Draw, in pieces where the engines take fewer images at once; see `Denoiser.draw`."""
        batch = len(job.texts)
        most, steps_at_once = self._fit(job)
        pieces = [slice(i, min(i + most, batch)) for i in range(0, batch, most)]
        # What a step left of the pieces before the last, so that the last one's step completes the batch's.
        earlier: list[list[np.ndarray]] = [[] for _ in job.timesteps]
        drawn = []
        for piece in pieces:
            part = dataclasses.replace(job, streams=job.streams[piece], texts=job.texts[piece])

            def after(step: int, latents: np.ndarray, last: bool = piece is pieces[-1]) -> None:
                earlier[step].append(latents)
                if last and on_step is not None:
                    on_step(step, np.concatenate(earlier[step]))

            drawn.append(self._denoise(part, steps_at_once, watch, after if on_step is not None else None))
        if len(drawn) == 1:
            return drawn[0]
        pixels = [d.pixels for d in drawn if d.pixels is not None]
        return Denoised(np.concatenate([d.latents for d in drawn]), np.concatenate(pixels) if pixels else None)

    def warm_up(self, job: DenoiseJob) -> None:
        """Draw twice: plainly, then as a graph; see `Denoiser.warm_up`."""
        for _ in range(2 if self._parts.keep else 0):
            self.denoise(job, Stopwatch())

    def close(self) -> None:
        """Free every plan; see `Denoiser.close`."""
        with self._lock:
            self._closed = True
            self._drop_plans(0)
            self._lane.release_workspace()

    def _denoise(self, job: DenoiseJob, steps_at_once: int, watch: Stopwatch, on_step: OnStep | None) -> Denoised:
        with self._lock:
            if self._closed:
                raise EngineError("this pipeline is closed; load it again with Pipeline.load")
            modulation = self._modulation_source(job)
            given = self._condition(job, watch) if modulation == "given" else None
            grid, texts = job.grid, job.texts
            size = DenoiseShape(len(texts), grid, texts[0].states.shape[1], len(job.timesteps))
            plan = self._plan(PlanKey(size, job.pixels, modulation), steps_at_once, job)
            with watch("stage"):
                plan.buffers.stage(job, given)
            try:
                if self._parts.keep:
                    plan.run(on_step)
                else:
                    plan.run_staged(lambda part: self._opened(part, plan.buffers.inputs[part]), on_step)
            except BaseException:
                # What it left enqueued or half-captured is not known.
                self._plans.pop(plan.key, None)
                plan.close()
                raise
            if plan.obstacle is not None and plan.obstacle not in self._logged:
                self._logged.add(plan.obstacle)
                _log.warning("pictures are enqueued without a CUDA graph: %s", plan.obstacle)
            for stage, ms in plan.times_ms().items():
                watch.add(stage, ms)
            return plan.buffers.read()

    def _fit(self, job: DenoiseJob) -> tuple[int, int]:
        """The most images, and the most timesteps of one conditioner's run, that the engines take.

        Raises:
            EngineError: they do not take one image of this size.
        """
        steps = len(job.timesteps)
        wrong: str | None = None
        for batch in range(len(job.texts), 0, -1):
            wrong = self._misfit(job, batch)
            if wrong is None and job.table is not None:
                return batch, steps
            for at_once in range(steps, 0, -1) if wrong is None else ():
                wrong = self._limits("conditioner", conditioner_inputs(self._bundle.manifest, batch, at_once))
                if wrong is None:
                    return batch, at_once
        raise EngineError(str(wrong))

    def _misfit(self, job: DenoiseJob, batch: int) -> str | None:
        """What is wrong with `batch` such images for the backbone and the decoder, or None."""
        tokens = job.texts[0].states.shape[1]
        size = DenoiseShape(batch, job.grid, tokens, len(job.timesteps))
        wrong = self._limits("backbone", backbone_inputs(self._bundle.manifest, size))
        if wrong is None and job.pixels:
            wrong = self._limits("vae_decoder", decoder_inputs(self._bundle.manifest, size))
        return wrong

    def _modulation_source(self, job: DenoiseJob) -> Modulation:
        if job.table is not None:
            return "table"
        parts = self._bundle.manifest.parts
        # In one graph, what one engine writes the next one reads as it is.
        same = parts["conditioner"].outputs[0].dtype == _input_dtype(parts["backbone"].inputs, "modulation")
        return "conditioner" if same else "given"

    def _condition(self, job: DenoiseJob, watch: Stopwatch) -> np.ndarray:
        """The modulation [S, b, M] by way of the host, for a conditioner in another dtype than the backbone's."""
        inputs = {"timesteps": job.timesteps}
        pooled = [text.pooled for text in job.texts if text.pooled is not None]
        if pooled:
            inputs["pooled_projections"] = np.concatenate(pooled)
        if job.guidance is not None:
            inputs["guidance"] = np.full(len(job.texts), job.guidance, np.float32)
        with watch("condition"), self._parts.use("conditioner") as run:
            return run(inputs)["modulation"]

    def _plan(self, key: PlanKey, steps_at_once: int, job: DenoiseJob) -> Plan:
        """The plan of a key, made if it is not kept; the one unused for longest goes when there are too many."""
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        self._drop_plans(self._max_plans - 1)
        try:
            plan = self._make_plan(key, steps_at_once, job)
        except OutOfDeviceMemory:
            if not self._plans:
                raise
            _log.warning("out of device memory: graphs of %d other shapes are dropped", len(self._plans))
            self._drop_plans(0)
            self._lane.release_workspace()
            plan = self._make_plan(key, steps_at_once, job)
        self._plans[key] = plan
        return plan

    def _make_plan(self, key: PlanKey, steps_at_once: int, job: DenoiseJob) -> Plan:
        manifest = self._bundle.manifest
        with self._lane.enter():
            if self._kernels is None:
                self._kernels = self._lane.device.kernels()
            plan = Plan(self._lane, key, Buffers(self._lane, manifest, key, steps_at_once, job), self._kernels)
        try:
            if self._parts.keep:
                for part, inputs in plan.buffers.inputs.items():
                    plan.contexts[part] = self._context(part, inputs)
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
    def _opened(self, part: str, inputs: Shapes) -> Iterator[Context]:
        """Open a part for one stage; its memory is free again afterwards."""
        with self._parts.borrow(part) as engine:
            with self._lane.enter() as stream:
                context = _device_engine(engine).context(inputs, stream)
            try:
                with self._lane.enter():
                    if context.workspace_bytes:
                        workspace = self._lane.workspace(context.workspace_bytes, part)
                        context.set_workspace(workspace.address, workspace.nbytes)
                yield context
            finally:
                with self._lane.enter():
                    self._lane.settle()
                    context.close()
                    self._lane.release_workspace()

    def _drop_plans(self, keep: int) -> None:
        while len(self._plans) > keep:
            _, plan = self._plans.popitem(last=False)
            plan.close()


def _device_engine(engine: Engine) -> DeviceEngine:
    assert isinstance(engine, HostEngine), "a backend with a device denoiser opens such engines only"
    return engine.device_engine


def _input_dtype(specs: Sequence[TensorSpec], name: str) -> str:
    return next(s.dtype for s in specs if s.name == name)
