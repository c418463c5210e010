"""List the engines to build: a bundle, a backend and options -> one `BuildJob` with its key per part and target.

Called by `arcflow build` before it builds anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arcflow_runtime.build.build import BuildSettings
from arcflow_runtime.build.profiles import Size, make_profiles
from arcflow_runtime.build.targets import capability, choose_targets, first_capability
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import EngineKey, part_key_fields
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.disk.quant_formats import FORMATS, formats_of
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.tensorrt_library import LIBRARIES, this_platform
from arcflow_runtime.errors import EngineError, RequestError


@dataclass(frozen=True)
class BuildJob:
    """One engine to build, unless the bundle already has an engine with this key."""

    part: str
    target: str
    key: EngineKey


def plan_builds(
    bundle: Bundle,
    backend: str,
    targets: Sequence[str],
    parts: Sequence[str],
    sizes: tuple[Size, ...],
    batch: SizeRange,
    settings: BuildSettings,
) -> list[BuildJob]:
    """Check every option against the bundle, the library and this machine, before anything is built.

    Args:
        bundle: an opened bundle.
        backend: a key of `LIBRARIES`.
        targets: compute capabilities such as "sm89"; empty means that of this machine's GPU.
        parts: parts of the bundle; empty means all.
        sizes: image sizes, one optimisation profile each; empty means `default_size`.
        batch: images per call.
        settings: options of the builder.

    Raises:
        RequestError: an option is wrong for this bundle or library.
        EngineError: the library is missing, or it needs a GPU and there is none, or a target does not support a part's
            dtype.
    """
    library = LIBRARIES[backend]
    if unknown := sorted(set(parts) - bundle.manifest.parts.keys()):
        raise RequestError(f"--parts must be among {', '.join(bundle.manifest.parts)}, got {', '.join(unknown)}")
    if settings.timing_cache is not None and library.ahead_of_time:
        raise RequestError(f"--timing-cache: {backend} builds without timing kernels; leave it out")
    gpu = find_gpu()
    targets = choose_targets(library, targets, gpu)
    version = library.load().__version__
    jobs = []
    for part in parts or bundle.manifest.parts:
        profiles = make_profiles(bundle.manifest, part, sizes, batch)
        for target in targets:
            _check_precision(bundle, part, target)
            key = EngineKey(
                **part_key_fields(bundle, part),
                profiles=profiles,
                flags=settings.flags(library),
                optimization_level=settings.optimization_level,
                workspace_bytes=settings.workspace_bytes,
                builder=backend,
                builder_version=version,
                target=target,
                gpu=library.key_gpu(gpu),
                platform=this_platform(),
            )
            jobs.append(BuildJob(part, target, key))
    return jobs


def _check_precision(bundle: Bundle, part: str, target: str) -> None:
    spec = bundle.manifest.parts[part]
    for name in formats_of(spec):
        facts = FORMATS[name]
        if facts.first_sm is None:
            raise EngineError(
                f"{part} is in {facts.title}, which is for CPUs; build the bundle that this one was quantised from, or "
                "quantise that to FP8"
            )
        if capability(target) < facts.first_sm:
            raise EngineError(
                f"{part} is in {facts.title}, which {target} does not support; build for sm{facts.first_sm} or newer, "
                "or build the bundle that this one was quantised from"
            )
    if capability(target) < first_capability(spec.precision):
        raise EngineError(
            f"{part} is in {spec.precision}, which {target} does not support; export the bundle with --dtype float16"
        )
