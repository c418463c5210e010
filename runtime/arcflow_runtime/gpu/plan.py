"""Run one job on the GPU: staged inputs -> results, enqueued stage by stage, or captured as a CUDA graph and replayed.

`denoiser.py` makes one `GraphPlan` per shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import cast

from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.engines.denoiser import OnStep
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.arrays import PlanKey
from arcflow_runtime.gpu.buffers import Buffers
from arcflow_runtime.gpu.device import CaptureError, Event, Graph, KernelLauncher, Stream
from arcflow_runtime.gpu.engine import Context
from arcflow_runtime.gpu.kernels import EulerShape, UpdateShape
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.nvtx import named_range

_HEADS = ("means", "logweights", "loggammas")

#: Part -> a context manager that yields its execution contexts for one stage, one for each of `Buffers.contexts`.
Use = Callable[[str], AbstractContextManager[Sequence[Context]]]


class GraphPlan:
    """The buffers, execution contexts and CUDA graph of one key; used by one thread at a time.

    `contexts` holds the contexts that stay open, by part. In the memory mode "low" it is empty: `run_staged` is given
    contexts for each stage, and there is no graph. `obstacle` is the reason why no graph could be captured, or None.
    """

    def __init__(self, lane: Lane, key: PlanKey, buffers: Buffers, kernels: KernelLauncher) -> None:
        self.key, self.buffers = key, buffers
        self.contexts: dict[str, list[Context]] = {}
        self.graph: Graph | None = None
        self.obstacle: str | None = None
        self._lane, self._kernels = lane, kernels
        self._generation: int | None = None
        self._warm = False
        self._events: list[Event] = []
        self._marks: list[str] = []

    def run(self, on_step: OnStep | None = None) -> None:
        """Run the staged job with this plan's contexts, and wait for the result.

        The first run enqueues the work without a graph, the second captures the graph, and later runs replay it.

        Args:
            on_step: as for `Denoiser.denoise`; with it the work is always enqueued without a graph.

        Raises:
            EngineError: an engine failed.
        """
        # The lane is held throughout, so that no other plan replaces the workspace meanwhile.
        with self._lane.enter() as stream, named_range("arcflow denoise"):
            self.bind()
            if on_step is None and self._warm and self.graph is None and self.obstacle is None:
                self._capture(stream)
            if on_step is None and self.graph is not None:
                self.graph.launch()
            else:
                self._enqueue(lambda part: nullcontext(self.contexts[part]), on_step)
                self._warm = True
            done = self._lane.device.make_event()
            stream.record(done)
        done.wait()

    def run_staged(self, use: Use, on_step: OnStep | None = None) -> None:
        """Run the staged job with contexts that `use` opens for one stage each, and wait; see `run`.

        The lane is taken within each stage only, because `use` may take the lock of `Parts`, which comes before the
        lane's.
        """
        with named_range("arcflow denoise"):
            self._enqueue(use, on_step)
            with self._lane.enter() as stream:
                stream.wait()

    def times_ms(self) -> dict[str, float]:
        """Milliseconds that each stage of the last run took on the device."""
        ms: dict[str, float] = {}
        for (before, event), stage in zip(pairwise(self._events[: len(self._marks)]), self._marks[1:], strict=True):
            ms[stage] = ms.get(stage, 0.0) + event.ms_since(before)
        return ms

    def close(self) -> None:
        """Wait until the stream is idle, then free everything."""
        with self._lane.enter():
            self._lane.settle()
            self._drop_graph()
            for _, context in self._all_contexts():
                context.close()
            self.contexts.clear()
            self.buffers.close()

    def bind(self) -> None:
        """Give the contexts the lane's workspace, and drop a graph that uses an older one. The caller holds the lane.

        Raises:
            OutOfDeviceMemory: there is not enough memory for the workspace.
        """
        part, largest = max(self._all_contexts(), key=lambda found: found[1].workspace_bytes)
        if largest.workspace_bytes == 0:
            return
        workspace = self._lane.workspace(largest.workspace_bytes, part)
        if self._generation != self._lane.generation:
            self._drop_graph()
            for _, context in self._all_contexts():
                context.set_workspace(workspace.address, workspace.nbytes)
            self._generation, self._warm = self._lane.generation, False

    def _capture(self, stream: Stream) -> None:
        """Capture the graph, or set `obstacle` to the reason why it cannot be captured."""
        for part, context in self._all_contexts():
            if (why := context.obstacle(stream)) is not None:
                self.obstacle = f"{part}: {why}"
                return
        try:
            stream.begin_capture()
            try:
                self._enqueue(lambda part: nullcontext(self.contexts[part]), None)
            except BaseException:
                stream.abort_capture()
                raise
            self.graph = stream.end_capture()
        except (CaptureError, EngineError) as e:
            self.obstacle = f"the capture failed: {e}"

    def _all_contexts(self) -> list[tuple[str, Context]]:
        return [(part, context) for part, contexts in self.contexts.items() for context in contexts]

    def _enqueue(self, use: Use, on_step: OnStep | None) -> None:
        """Enqueue the whole job, from the copy of the staged inputs to the copy of the results."""
        buffers, lane = self.buffers, self._lane
        self._marks = []
        with lane.enter() as stream:
            self._mark(stream, "start")
            stream.copy(buffers["streams"], buffers.staging_address, buffers.staged.nbytes)
            self._mark(stream, "copy")
            addresses = {name: buffers[name] for name in ("streams", "latents")}
            self._kernels.noise(stream, buffers.noise_shape(), **addresses, engine_input=buffers.engine_input)
            self._mark(stream, "noise")
        if self.key.modulation == "conditioner":
            with use("conditioner") as contexts, lane.enter() as stream:
                self._condition(stream, contexts[0])
                self._mark(stream, "condition")
        with use("backbone") as contexts:
            for step in range(self.key.size.steps):
                with lane.enter() as stream:
                    self._step(stream, contexts, step)
                if on_step is not None:
                    with lane.enter() as stream:
                        self._copy_result(stream, "latents")
                        stream.wait()
                    on_step(step, buffers.read_latents())
        if self.key.pixels:
            with use("vae_decoder") as contexts, lane.enter() as stream:
                contexts[0].enqueue({name: buffers[name] for name in ("latents", "images")}, stream)
                self._mark(stream, "decode")
        with lane.enter() as stream:
            for name in buffers.results.regions:
                self._copy_result(stream, name)
            self._mark(stream, "copy")

    def _condition(self, stream: Stream, context: Context) -> None:
        """Compute the modulation of every step, as many steps per run as the engine accepts."""
        buffers = self.buffers
        target, made = buffers.region("modulations"), buffers.region("conditioned")
        for run, start in enumerate(buffers.starts):
            addresses = {"timesteps": buffers[f"timesteps.{run}"], "modulation": buffers["conditioned"]}
            addresses |= buffers.slots["conditioner"]
            for short, name in (("pooled", "pooled_projections"), ("guidance", "guidance")):
                if short in buffers:
                    addresses[name] = buffers[short]
            context.enqueue(addresses, stream)
            offset = start * (target.nbytes // target.shape[0])
            stream.copy(buffers["modulations"] + offset, buffers["conditioned"], made.nbytes)

    def _step(self, stream: Stream, contexts: Sequence[Context], step: int) -> None:
        """Run the backbone at one sigma, twice with guidance, and the update to the next one."""
        buffers, size = self.buffers, self.key.size
        # A step's rows of the modulation may start at an unaligned address, so they are copied to an aligned one.
        steps, rows, _ = buffers.region("modulations").shape
        nbytes = buffers.region("modulations").nbytes // steps
        for copy in range(size.batch // rows):
            stream.copy(buffers["modulation"] + copy * nbytes, buffers["modulations"] + step * nbytes, nbytes)
        if "velocity" in buffers:
            self._run_backbone(stream, contexts[0], "states", "text_rotary", {"velocity": buffers["velocity"]})
            if self.key.negative_tokens:
                negative = {"velocity": buffers["negative_velocity"]}
                self._run_backbone(stream, contexts[-1], "negative_states", "negative_rotary", negative)
            self._euler(stream, step)
        else:
            self._run_backbone(stream, contexts[0], "states", "text_rotary", {name: buffers[name] for name in _HEADS})
            self._update(stream, step)
        self._mark(stream, "update")

    def _run_backbone(
        self, stream: Stream, context: Context, states: str, rotary: str, outputs: Mapping[str, int]
    ) -> None:
        """Run the backbone on the text in the regions `states` and `rotary`; `outputs` are addresses by name."""
        buffers = self.buffers
        context.enqueue(
            {
                "latents": buffers.engine_input or buffers["latents"],
                "encoder_hidden_states": buffers[states],
                "modulation": buffers["modulation"],
                "image_rotary": buffers["image_rotary"],
                "text_rotary": buffers[rotary],
                **buffers.slots["backbone"],
                **outputs,
            },
            stream,
        )
        self._mark(stream, "backbone")

    def _update(self, stream: Stream, step: int) -> None:
        """A momentum student's step."""
        buffers, size = self.buffers, self.key.size
        means = buffers.region("means")
        shape = UpdateShape(
            tokens=size.batch * size.image_tokens,
            modes=means.shape[2],
            channels=means.shape[3],
            sub_pixels=buffers.region("logweights").shape[3],
            heads=cast(DType, means.dtype),
            engine_input=buffers.input_dtype,
        )
        self._kernels.update(
            stream,
            shape,
            **{name: buffers[name] for name in _HEADS},
            latents=buffers["latents"],
            next_latents=buffers["latents"],
            engine_input=buffers.engine_input,
            sigmas=buffers["sigmas"],
            step=step,
        )

    def _euler(self, stream: Stream, step: int) -> None:
        """A straight student's step."""
        buffers, size, guided = self.buffers, self.key.size, self.key.negative_tokens > 0
        velocity = buffers.region("velocity")
        shape = EulerShape(
            tokens=size.batch * size.image_tokens,
            channels=velocity.shape[2],
            velocity=cast(DType, velocity.dtype),
            engine_input=buffers.input_dtype,
        )
        self._kernels.euler(
            stream,
            shape,
            velocity=buffers["velocity"],
            negative=buffers["negative_velocity"] if guided else 0,
            latents=buffers["latents"],
            next_latents=buffers["latents"],
            engine_input=buffers.engine_input,
            sigmas=buffers["sigmas"],
            scale=buffers["scale"] if guided else 0,
            step=step,
        )

    def _copy_result(self, stream: Stream, name: str) -> None:
        stream.copy(self.buffers.result_address(name), self.buffers[name], self.buffers.results[name].nbytes)

    def _mark(self, stream: Stream, stage: str) -> None:
        """Record the end of `stage` with this position's own event, because a graph records the events it captured."""
        if len(self._marks) == len(self._events):
            self._events.append(self._lane.device.make_event())
        stream.record(self._events[len(self._marks)])
        self._marks.append(stage)

    def _drop_graph(self) -> None:
        if self.graph is not None:
            self.graph.close()
            self.graph = None
