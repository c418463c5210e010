"""Draws with plans kept in a bounded cache: a `Drawing` -> latents and pictures, one graph launch each."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..bundle import Bundle, TensorSpec
from ..engines.base import Drawing, Drawn, Engine, OnStep
from ..errors import EngineError
from ..parts import Parts
from ..stopwatch import Stopwatch
from .buffers import Buffers, Modulation, PlanKey
from .device import Kernels
from .engine import Context, DeviceEngine, Shapes
from .host import HostEngine
from .lane import Lane, OutOfDeviceMemory
from .plan import Plan
from .shapes import DrawSize, backbone_inputs, conditioner_inputs, decoder_inputs

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

    def draw(self, drawing: Drawing, watch: Stopwatch, on_step: OnStep | None = None) -> Drawn:
        """Draw, in pieces where the engines take fewer images at once; see `Denoiser.draw`."""
        batch = len(drawing.texts)
        most, steps_at_once = self._fit(drawing)
        pieces = [slice(i, min(i + most, batch)) for i in range(0, batch, most)]
        # What a step left of the pieces before the last, so that the last one's step completes the batch's.
        earlier: list[list[np.ndarray]] = [[] for _ in drawing.timesteps]
        drawn = []
        for piece in pieces:
            part = dataclasses.replace(drawing, streams=drawing.streams[piece], texts=drawing.texts[piece])

            def after(step: int, latents: np.ndarray, last: bool = piece is pieces[-1]) -> None:
                earlier[step].append(latents)
                if last and on_step is not None:
                    on_step(step, np.concatenate(earlier[step]))

            drawn.append(self._draw(part, steps_at_once, watch, after if on_step is not None else None))
        if len(drawn) == 1:
            return drawn[0]
        pixels = [d.pixels for d in drawn if d.pixels is not None]
        return Drawn(np.concatenate([d.latents for d in drawn]), np.concatenate(pixels) if pixels else None)

    def warm_up(self, drawing: Drawing) -> None:
        """Draw twice: plainly, then as a graph; see `Denoiser.warm_up`."""
        for _ in range(2 if self._parts.keep else 0):
            self.draw(drawing, Stopwatch())

    def close(self) -> None:
        """Free every plan; see `Denoiser.close`."""
        with self._lock:
            self._closed = True
            self._drop_plans(0)
            self._lane.release_workspace()

    def _draw(self, drawing: Drawing, steps_at_once: int, watch: Stopwatch, on_step: OnStep | None) -> Drawn:
        with self._lock:
            if self._closed:
                raise EngineError("this pipeline is closed; load it again with Pipeline.load")
            modulation = self._modulation_source(drawing)
            given = self._condition(drawing, watch) if modulation == "given" else None
            grid, texts = drawing.grid, drawing.texts
            size = DrawSize(len(texts), grid, texts[0].states.shape[1], len(drawing.timesteps))
            plan = self._plan(PlanKey(size, drawing.pixels, modulation), steps_at_once, drawing)
            with watch("stage"):
                plan.buffers.stage(drawing, given)
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

    def _fit(self, drawing: Drawing) -> tuple[int, int]:
        """The most images, and the most timesteps of one conditioner's run, that the engines take.

        Raises:
            EngineError: they do not take one image of this size.
        """
        steps = len(drawing.timesteps)
        wrong: str | None = None
        for batch in range(len(drawing.texts), 0, -1):
            wrong = self._misfit(drawing, batch)
            if wrong is None and drawing.table is not None:
                return batch, steps
            for at_once in range(steps, 0, -1) if wrong is None else ():
                wrong = self._limits("conditioner", conditioner_inputs(self._bundle.manifest, batch, at_once))
                if wrong is None:
                    return batch, at_once
        raise EngineError(str(wrong))

    def _misfit(self, drawing: Drawing, batch: int) -> str | None:
        """What is wrong with `batch` such images for the backbone and the decoder, or None."""
        tokens = drawing.texts[0].states.shape[1]
        size = DrawSize(batch, drawing.grid, tokens, len(drawing.timesteps))
        wrong = self._limits("backbone", backbone_inputs(self._bundle.manifest, size))
        if wrong is None and drawing.pixels:
            wrong = self._limits("vae_decoder", decoder_inputs(self._bundle.manifest, size))
        return wrong

    def _modulation_source(self, drawing: Drawing) -> Modulation:
        if drawing.table is not None:
            return "table"
        parts = self._bundle.manifest.parts
        # In one graph, what one engine writes the next one reads as it is.
        same = parts["conditioner"].outputs[0].dtype == _input_dtype(parts["backbone"].inputs, "modulation")
        return "conditioner" if same else "given"

    def _condition(self, drawing: Drawing, watch: Stopwatch) -> np.ndarray:
        """The modulation [S, b, M] by way of the host, for a conditioner in another dtype than the backbone's."""
        inputs = {"timesteps": drawing.timesteps}
        pooled = [text.pooled for text in drawing.texts if text.pooled is not None]
        if pooled:
            inputs["pooled_projections"] = np.concatenate(pooled)
        if drawing.guidance is not None:
            inputs["guidance"] = np.full(len(drawing.texts), drawing.guidance, np.float32)
        with watch("condition"), self._parts.use("conditioner") as run:
            return run(inputs)["modulation"]

    def _plan(self, key: PlanKey, steps_at_once: int, drawing: Drawing) -> Plan:
        """The plan of a key, made if it is not kept; the one unused for longest goes when there are too many."""
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        self._drop_plans(self._max_plans - 1)
        try:
            plan = self._make_plan(key, steps_at_once, drawing)
        except OutOfDeviceMemory:
            if not self._plans:
                raise
            _log.warning("out of device memory: graphs of %d other shapes are dropped", len(self._plans))
            self._drop_plans(0)
            self._lane.release_workspace()
            plan = self._make_plan(key, steps_at_once, drawing)
        self._plans[key] = plan
        return plan

    def _make_plan(self, key: PlanKey, steps_at_once: int, drawing: Drawing) -> Plan:
        manifest = self._bundle.manifest
        with self._lane.enter():
            if self._kernels is None:
                self._kernels = self._lane.device.kernels()
            plan = Plan(self._lane, key, Buffers(self._lane, manifest, key, steps_at_once, drawing), self._kernels)
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
                with self._lane.enter() as stream:
                    stream.wait()
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
