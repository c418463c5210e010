"""Measure the scratch memory that TensorRT-RTX's engines of FLUX.1-dev's real shapes need on a GPU, without one.

The weights are random; the figures are the builder's own, from the engines' records. One set of rows has every part at
the default shapes, with the backbone in FP8, and what building it took. The other has the VAE decoder by image size,
also with its attention split into 16 groups of queries. Criterion: every engine is built, and none allocates memory
when it runs. The files are deleted at the end. Several runs with different `--rows` write into the same JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from export_fullsize import MeasureError, run_arcflow
from fullsize_bundle import flux_parts, make_tiny, put_part
from machine import describe as describe_machine
from onnx import TensorProto, helper
from quantize_fullsize import BLOCKS, make_bundle, make_scales

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.manifest import MANIFEST, FileEntry
from arcflow_runtime.engines.tensorrt_library import LIBRARIES

LIBRARY = LIBRARIES["tensorrt-rtx"]
TARGET = "sm89"
DECODER = "decoder"
ROWS = ("text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder", DECODER)
#: A split needs a number of queries that is a multiple of 16: sides of at least 32 pixels.
SIZES = ("512", "1024", "1536", "2048", "32-1024", "32-1536", "32-2048")
QUERY_GROUPS = 16
RESULT = Path(__file__).parent / "results" / "engine_memory.json"


def split_queries(graph: Path, groups: int) -> None:
    """Rewrite the one softmax attention of a VAE's graph, softmax(q k^T) v, as `groups` attentions of as many queries.

    Each group reads all keys and values. The groups depend on each other in no way, so an engine may compute them one
    after the other in the same memory.
    """
    model = onnx.load(graph, load_external_data=False)
    nodes = list(model.graph.node)
    (softmax,) = (n for n in nodes if n.op_type == "Softmax")
    by_output = {name: n for n in nodes for name in n.output}
    before, after = [softmax], [softmax]
    while before[0].op_type != "MatMul":
        before.insert(0, by_output[before[0].input[0]])
    while after[-1].op_type != "MatMul":
        (following,) = (n for n in nodes if after[-1].output[0] in n.input)
        after.append(following)
    chain = [*before, *after[1:]]  # q k^T, a cast, softmax, a cast, the product with v
    (q, keys), (_, values), (out,) = chain[0].input, chain[-1].input, chain[-1].output
    width = next(i for i in model.graph.initializer if i.name in by_output[values].input).dims[-1]
    for name, value in (("split.shape", [0, groups, -1, width]), ("split.axis", [1])):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(value)], value))
    made = [
        helper.make_node("Reshape", [q, "split.shape"], ["split.q"]),
        helper.make_node("Split", ["split.q"], [f"split.q{i}" for i in range(groups)], axis=1, num_outputs=groups),
    ]
    for i in range(groups):
        made.append(helper.make_node("Squeeze", [f"split.q{i}", "split.axis"], [f"split.{i}.0"]))
        for j, node in enumerate(chain):
            other = {0: [keys], len(chain) - 1: [values]}.get(j, [])
            copy = helper.make_node(node.op_type, [f"split.{i}.{j}", *other], [f"split.{i}.{j + 1}"])
            copy.attribute.extend(node.attribute)
            made.append(copy)
    made.append(helper.make_node("Concat", [f"split.{i}.{len(chain)}" for i in range(groups)], [out], axis=1))
    at = nodes.index(chain[-1]) + 1
    before_it = [n for n in nodes[:at] if n not in chain]
    del model.graph.node[:]
    model.graph.node.extend([*before_it, *made, *nodes[at:]])
    onnx.save(model, graph)
    onnx.checker.check_model(str(graph))


def build(root: Path, part: str, *options: str) -> dict[str, Any]:
    """Build one engine and remove it.

    Returns:
        Scratch memory, whether it allocates, sizes and times; or the error. All of them as in the JSON.
    """
    command = ("--backend", LIBRARY.name, "--target", TARGET, "--parts", part, "--anyway", *options)
    try:
        built, used = run_arcflow("build", str(root), *command)
    except MeasureError as e:
        return {"part": part, "error": str(e)}
    finally:
        shutil.rmtree(root / "engines", ignore_errors=True)
    (engine,) = built["engines"]
    kept = ("bytes", "activation_bytes", "allocates_when_run", "build_seconds")
    return {"part": part} | {key: engine[key] for key in kept} | used


def measure_part(name: str, folder: Path) -> dict[str, Any]:
    """Build one part of real size for the default shapes; the backbone in FP8, the others in bfloat16."""
    if name == "backbone":
        source, scales, root = folder / "bundle", folder / "scales.json", folder / "bundle8"
        make_scales(make_bundle(source, BLOCKS)).save(scales)
        run_arcflow("quantize", str(source), "--scales", str(scales), "--out", str(root))
        shutil.rmtree(source)
    else:
        root = folder / "bundle"
        put_part(make_tiny(root), flux_parts(folder / "configs", "bfloat16")[name])
    bundle = Bundle.open(root)
    spec = bundle.manifest.parts[name]
    return {"weight_bytes": bundle.manifest.files[spec.weights].bytes, **build(root, name)}


def measure_decoder(folder: Path) -> list[dict[str, Any]]:
    """Build the VAE decoder for each of `SIZES`, as it is exported and with split queries."""
    root = folder / "bundle"
    bundle = put_part(make_tiny(root), flux_parts(folder / "configs", "bfloat16")["vae_decoder"])
    rows = []
    for groups in (1, QUERY_GROUPS):
        if groups > 1:
            graph = bundle.path("vae_decoder.onnx")
            split_queries(graph, groups)
            files = {**bundle.manifest.files, graph.name: FileEntry(graph.stat().st_size, sha256_file(graph))}
            (root / MANIFEST).write_text(replace(bundle.manifest, files=files).to_json(), encoding="utf-8")
        for size in SIZES:
            rows.append({"size": size, "query_groups": groups, **build(root, "vae_decoder", "--resolutions", size)})
    return rows


def main() -> int:
    """Parse the command line and measure; returns 0 if the criterion is met, 1 if it is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="existing directory to work in")
    parser.add_argument(
        "--rows", default=",".join(ROWS), metavar="ROW[,ROW...]", help="what to measure; default: %(default)s"
    )
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    found = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {"parts": {}, "decoder": []}
    for name in args.rows.split(","):
        with tempfile.TemporaryDirectory(prefix="engines-", dir=args.folder) as folder:
            if name == DECODER:
                found["decoder"] = measured = measure_decoder(Path(folder))
            else:
                found["parts"][name] = row = measure_part(name, Path(folder))
                measured = [row]
        for row in measured:
            print(json.dumps(row))
        found["parts"] = {name: found["parts"][name] for name in ROWS if name in found["parts"]}
        found |= {
            "command": "python benchmarks/engine_memory.py",
            "target": TARGET,
            "library": LIBRARY.load().__version__,
            "machine": describe_machine(),
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    rows = [*found["parts"].values(), *found["decoder"]]
    return 1 if any("error" in r or r["allocates_when_run"] for r in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
