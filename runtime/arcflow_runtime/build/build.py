"""Build one engine with TensorRT or TensorRT-RTX: a part's ONNX graph and weights -> the serialised engine.

Called by `arcflow build`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from arcflow_runtime.build.static_axes import fix_static_axes
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import Profile
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.store import BuildReport
from arcflow_runtime.engines.tensorrt_library import Library
from arcflow_runtime.errors import EngineError

_SHOWN_ERRORS = 5
#: From this opset on, attention is one ONNX operator. The libraries have no float32 kernels for it and, at least up to
#: TensorRT-RTX 1.7, no kernels for head sizes below 16.
_FUSED_ATTENTION_OPSET = 23
#: What the builder logs, once per profile: the scratch memory of the profile's largest shapes.
_ACTIVATIONS = re.compile(r"^Total Activation Memory: (\d+) bytes")
#: What it logs if no scratch memory of a fixed size holds the largest shapes. The engine then allocates in each run.
_ALLOCATES = "Enable Runtime Tensor Allocation (RTA)"
#: What it logs if the largest shapes need more scratch memory than it may use: --workspace, or 64 GiB without a GPU.
_OUT_OF_MEMORY = re.compile(r"OutOfMemory(?: \(Requested size was (\d+) bytes)?")


@dataclass(frozen=True)
class BuildSettings:
    """Options of the builder; None is the builder's default.

    `strip_weights` builds an engine without weights, which are read from the part's weights file each time it is
    loaded. `weight_streaming` lets the engine keep part of its weights in host memory. `timing_cache` is a file that is
    read if it exists and written after each build.
    """

    optimization_level: int | None = None
    workspace_bytes: int | None = None
    strip_weights: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None

    def flags(self, library: Library) -> tuple[str, ...]:
        """The builder flags and preview features to set, sorted, and "-TF32": as in an engine's key (E2).

        Of TensorRT's flags, TF32 alone is on by default. It rounds the factors of float32 products to 10 bits of
        mantissa, so it is always cleared. An engine whose weights are streamed allocates memory in each run, and
        refuses to be built with a flag that forbids it.
        """
        flags = {"-TF32", *library.flags}
        if self.strip_weights:
            flags |= {"REFIT_IDENTICAL", "STRIP_PLAN"}
        if self.weight_streaming:
            flags = flags - {"REQUIRE_USER_ALLOCATION"} | {"WEIGHT_STREAMING"}
        return tuple(sorted(flags))


class BuildProgress:
    """Receives the progress of a build, from any thread; subclass it to show a progress bar."""

    def update(self, done: int, total: int, phase: str) -> None:
        """`done` of the `total` steps known so far are finished; `total` grows. `phase` is the current phase's name."""


def build_engine(
    library: Library,
    bundle: Bundle,
    part: str,
    target: str,
    profiles: tuple[Profile, ...],
    settings: BuildSettings,
    out: BinaryIO,
    progress: BuildProgress | None = None,
) -> BuildReport:
    """Build one engine and write it to `out`.

    The build runs in its own thread, so that Ctrl-C and SIGTERM reach the caller. They stop the build at its next step
    and are then raised.

    Args:
        library: the library that builds.
        bundle: the bundle; its files must have been checked against its manifest.
        part: name of the part.
        target: compute capability such as "sm89"; ignored by a library that builds for the GPU it runs on.
        profiles: from `make_profiles`.
        settings: options of the builder.
        out: receives the engine's bytes.
        progress: called at every step.

    Returns:
        The seconds that parsing and building took, and what the builder said about the engine.

    Raises:
        BundleError: the graph's external data is not in the part's weights file.
        EngineError: the graph cannot be parsed or built; the message names the part and the nodes.
    """
    build = _Build(library, library.load(), bundle, part)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(build.run, target, profiles, settings, out, progress or BuildProgress()).result()
        except BaseException:
            # Leaving the `with` block waits for the thread, so nothing writes to `out` afterwards.
            build.cancelled.set()
            raise
    return build.report(time.perf_counter() - began, len(profiles))


class _Build:
    """One build with the library's module `trt`, and the errors that the library logs during it."""

    def __init__(self, library: Library, trt: ModuleType, bundle: Bundle, part: str) -> None:
        self.cancelled = threading.Event()
        self._library, self._trt, self._bundle, self._part = library, trt, bundle, part
        self._spec = bundle.manifest.parts[part]
        self._logger = _make_logger(trt)

    def run(
        self,
        target: str,
        profiles: tuple[Profile, ...],
        settings: BuildSettings,
        out: BinaryIO,
        progress: BuildProgress,
    ) -> None:
        trt = self._trt
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        graph = checked_graph(self._bundle, self._part)
        # The path tells where the external weights are: beside the graph.
        if not parser.parse(fix_static_axes(graph.read_bytes(), profiles), str(graph)):
            raise EngineError(self._parser_errors(parser, graph))
        if self.cancelled.is_set():
            return
        config = builder.create_builder_config()
        self._configure(config, target, settings)
        for profile in profiles:
            self._add_profile(builder, config, profile)
        cache = self._timing_cache(config, settings.timing_cache)
        monitor = _make_monitor(trt, progress, self.cancelled)
        config.progress_monitor = monitor
        writer = _make_writer(trt, out)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if self.cancelled.is_set():
            return
        if writer.error is not None:
            raise writer.error
        if not built:
            raise EngineError(self._build_error(settings))
        if cache is not None and settings.timing_cache is not None:
            _replace_file(settings.timing_cache, cache.serialize())

    def report(self, seconds: float, profiles: int) -> BuildReport:
        """What the build took, and what the log says about the engine; TensorRT may say nothing of its memory."""
        found = self._logger.activation_bytes
        return BuildReport(seconds, tuple(found) if len(found) == profiles else None, self._logger.allocates)

    def _configure(self, config: Any, target: str, settings: BuildSettings) -> None:
        trt = self._trt
        if self._library.ahead_of_time:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0):
                raise EngineError(
                    f"{self._part}: {self._library.name} cannot build for {target}; give another --target"
                )
        for flag in settings.flags(self._library):
            if flag.startswith("-"):
                config.clear_flag(getattr(trt.BuilderFlag, flag[1:]))
            elif hasattr(trt.PreviewFeature, flag):
                config.set_preview_feature(getattr(trt.PreviewFeature, flag), True)
            else:
                config.set_flag(getattr(trt.BuilderFlag, flag))
        if settings.optimization_level is not None:
            config.builder_optimization_level = settings.optimization_level
        if settings.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)

    def _add_profile(self, builder: Any, config: Any, profile: Profile) -> None:
        made = builder.create_optimization_profile()
        for name, shapes in profile.items():
            made.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(made) < 0:
            raise EngineError(f"{self._part}: {self._library.name} rejects the shapes {dict(profile)}{self._logged()}")

    def _timing_cache(self, config: Any, path: Path | None) -> Any:
        if path is None:
            return None
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise EngineError(
                f"--timing-cache: {path} is damaged, or from another GPU or version of {self._library.name}; "
                "remove it or name another file"
            )
        return cache

    def _parser_errors(self, parser: Any, graph: Path) -> str:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [f"{self._part}: {self._library.name} cannot read {graph}:"]
        for e in errors[:_SHOWN_ERRORS]:
            node = f"node {e.node_name()!r} ({e.node_operator()})" if e.node_operator() else "the file"
            lines.append(f"  {node}: {e.desc()}")
        if len(errors) > _SHOWN_ERRORS:
            lines.append(f"  and {len(errors) - _SHOWN_ERRORS} more")
        return "\n".join(lines)

    def _build_error(self, settings: BuildSettings) -> str:
        text = f"{self._part}: {self._library.name} cannot build an engine"
        if (memory := next(filter(None, map(_OUT_OF_MEMORY.search, self._logger.errors)), None)) is not None:
            limit = f"the {int(memory[1]) / 1e9:.1f} GB that it may have" if memory[1] else "there is"
            text += f": its largest shapes need more scratch memory than {limit}; "
            text += "give smaller --resolutions or a smaller --batch"
            text += "" if settings.workspace_bytes is None else ", or a larger --workspace"
        opset = self._bundle.manifest.opset
        if opset >= _FUSED_ATTENTION_OPSET and any("Attention" in e for e in self._logger.errors):
            if self._spec.precision == "float32":
                text += (
                    f" of a float32 graph at opset {opset}, whose Attention operator has no float32 kernels; "
                    "export with --opset 20, or with --dtype bfloat16 or float16"
                )
            else:
                text += (
                    f" of a graph at opset {opset}: its Attention operator has no kernel for heads of this size; "
                    "export with --opset 20, which writes attention as separate operators"
                )
        if settings.strip_weights and find_gpu() is None:
            text += " without its weights where there is no GPU; leave out --strip-weights"
        return text + self._logged()

    def _logged(self) -> str:
        """The errors that the library logged: a colon, then one line each; "" if there are none."""
        errors = self._logger.errors
        if self._library.ahead_of_time:
            # CUDA errors only mean that there is no driver here, which does not matter when building for another
            # machine.
            errors = [e for e in errors if "(cudaError " not in e] or errors
        return ":" + "".join(f"\n  {line}" for line in errors[:_SHOWN_ERRORS]) if errors else ""


def _make_logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Collects error messages and what is said of the engine's memory, and drops all other messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation_bytes: list[int] = []
            self.allocates = False

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            elif (found := _ACTIVATIONS.match(message)) is not None:
                self.activation_bytes.append(int(found[1]))
            elif _ALLOCATES in message:
                self.allocates = True

    return Logger()


def _make_monitor(trt: ModuleType, progress: BuildProgress, cancelled: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Counts the steps of all phases, nested ones too. A phase may finish before it has reported all its steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._open: dict[str, tuple[int, int]] = {}
            self._done = self._total = 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._open[phase] = (0, steps)
                self._total += steps
                self._tell(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                done, steps = self._open.get(phase, (0, 0))
                if done < steps:
                    self._open[phase] = (done + 1, steps)
                    self._done += 1
                    self._tell(phase)
            return not cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                done, steps = self._open.pop(phase, (0, 0))
                self._done += steps - done
                self._tell(phase)

        def _tell(self, phase: str) -> None:
            progress.update(self._done, self._total, phase)

    return Monitor()


def _make_writer(trt: ModuleType, out: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[name-defined]
        """Writes to `out` and keeps an OSError for the caller; the library only learns the number of bytes written."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return out.write(data)
            except OSError as e:
                self.error = e
                return 0

    return Writer()


def _replace_file(path: Path, data: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
