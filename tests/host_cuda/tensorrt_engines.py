"""Engines for `tensorrt_bindings.py`: a bundle -> the files that `arcflow build` would write, and the CPU's images."""

from __future__ import annotations

import json

from arcflow_runtime import Pipeline
from arcflow_runtime.build.profiles import make_profiles, parse_sizes
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import EngineKey, part_key_fields
from arcflow_runtime.disk.manifest import SizeRange
from arcflow_runtime.engines import tensorrt_library as library
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from arcflow_runtime.engines.store import locked_store, write_engine

SIZE = {"height": 32, "width": 32, "seed": 1, "output_type": "latents", "max_sequence_length": 16}
PROMPT = "a red circle"


def build(root, name="tensorrt-rtx", flags=(), sizes="16-64", batch=(1, 2), **changes):
    """Write an engine of each part for these sizes; `changes` replace fields of their keys."""
    bundle = Bundle.open(root)
    with locked_store(bundle):
        for part in bundle.manifest.parts:
            key = EngineKey(
                **part_key_fields(bundle, part),
                profiles=make_profiles(bundle.manifest, part, parse_sizes(sizes), SizeRange(*batch)),
                flags=flags,
                optimization_level=None,
                workspace_bytes=None,
                **({"builder": name, "builder_version": "1.7.1", "target": "sm89"} | changes),
                gpu=None if name == "tensorrt-rtx" else "Host memory",
                platform=library.this_platform(),
            )
            graph = str(bundle.path(bundle.manifest.parts[part].graph))
            about = {"graph": graph, "stripped": "STRIP_PLAN" in flags, "streams": "WEIGHT_STREAMING" in flags}
            write_engine(bundle, key, lambda out, about=about: float(out.write(json.dumps(about).encode())))


def expected(root, **arguments):
    """The CPU's images for `PROMPT`; `arguments` replace those of `SIZE`."""
    with Pipeline(Bundle.open(root), OnnxRuntimeBackend(1)) as pipe:
        return pipe(PROMPT, **(SIZE | arguments)).images
