"""Ask ONNX Runtime's CUDA provider which operators of a bundle's graphs it runs itself, and how accurately.

Each operator is a graph of its own, in float32, float16 and bfloat16, compared with float64. The session may not fall
back to the CPU, so an operator that the provider does not have is an error, whose text is kept.

    python benchmarks/gpu/onnxruntime_cuda.py --json FILE
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: The exit status of a step that cannot run on this machine; its last line says why.
CANNOT_RUN = 3
PROVIDER = "CUDAExecutionProvider"
OPSET = 23
_EPS = 1e-6
#: Dtype -> (TensorProto.DataType, half a unit in the last place).
DTYPES = {"float32": (1, 2.0**-24), "float16": (10, 2.0**-11), "bfloat16": (16, 2.0**-8)}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Operator:
    """One operator with the shapes of its inputs, and what it computes in float64."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any]
    exact: Callable[..., Array]


def _attention(q: Array, k: Array, v: Array) -> Array:
    scores = q @ k.transpose(0, 1, 3, 2) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def _rms_norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + _EPS) * weight


def _layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + _EPS) * weight + bias


_HEADS = (1, 24, 256, 128)
OPERATORS = (
    Operator("MatMul", ((256, 512), (512, 256)), {}, lambda a, b: a @ b),
    Operator("Attention", (_HEADS, _HEADS, _HEADS), {}, _attention),
    Operator("RMSNormalization", ((256, 128), (128,)), {"epsilon": _EPS}, _rms_norm),
    Operator("LayerNormalization", ((256, 128), (128,), (128,)), {"epsilon": _EPS}, _layer_norm),
    Operator("Conv", ((1, 16, 32, 32), (16, 16, 1, 1)), {}, lambda x, w: np.einsum("bchw,oc->bohw", x, w[:, :, 0, 0])),
    Operator("Softmax", ((256, 512),), {"axis": -1}, lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
)


def ask(operator: Operator, dtype: str, provider: str) -> dict[str, Any]:
    """Run one operator in one dtype: a row of the results."""
    import onnx
    import onnxruntime as ort

    code, half_ulp = DTYPES[dtype]
    names = [f"x{i}" for i in range(len(operator.shapes))]
    value = onnx.helper.make_tensor_value_info
    # Inputs and result are float32 and cast inside the graph, because numpy has no bfloat16.
    nodes = [onnx.helper.make_node("Cast", [n], [f"{n}.cast"], to=code) for n in names]
    nodes.append(onnx.helper.make_node(operator.name, [f"{n}.cast" for n in names], ["y"], **operator.attributes))
    nodes.append(onnx.helper.make_node("Cast", ["y"], ["out"], to=1))
    given = [value(n, 1, shape) for n, shape in zip(names, operator.shapes, strict=True)]
    graph = onnx.helper.make_graph(nodes, operator.name, given, [value("out", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=11)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # an error is also in the exception
    if provider == PROVIDER:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    row: dict[str, Any] = {"operator": operator.name, "dtype": dtype}
    rng = np.random.default_rng(0)
    # Multiples of 1/8 up to 2: exact in each dtype, so that the inputs' rounding is no part of the error.
    arrays = [rng.integers(-16, 17, shape).astype(np.float32) / 8 for shape in operator.shapes]
    provider_options = {"use_tf32": "0"} if provider == PROVIDER else {}
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, [(provider, provider_options)])
        (found,) = session.run(None, dict(zip(names, arrays, strict=True)))
    except Exception as e:  # ONNX Runtime's exceptions have no common base class except Exception
        return row | {"runs": False, "said": str(e).strip().splitlines()[0][:500]}
    exact = operator.exact(*(x.astype(np.float64) for x in arrays))
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    return row | {"runs": True, "error_in_half_ulps_of_the_largest": error / half_ulp}


def cannot_run(provider: str) -> str | None:
    """Why nothing can be asked here, or None."""
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        return f"the installed onnxruntime {ort.__version__} has no CUDA provider; install onnxruntime-gpu in its place"
    return None


def main() -> int:
    """Ask for every operator and dtype, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="write the results here, after each row")
    parser.add_argument("--provider", default=PROVIDER, help="(default: %(default)s)")
    args = parser.parse_args()
    if (why := cannot_run(args.provider)) is not None:
        print(why, file=sys.stderr)
        return CANNOT_RUN
    import onnxruntime as ort

    data: dict[str, Any] = {"onnxruntime": ort.__version__, "provider": args.provider, "rows": []}
    for operator in OPERATORS:
        for dtype in DTYPES:
            row = ask(operator, dtype, args.provider)
            data["rows"].append(row)
            args.json.write_text(json.dumps(data, indent=2) + "\n")
            said = f"{row['error_in_half_ulps_of_the_largest']:.2f} half ulps" if row["runs"] else row["said"]
            print(f"{operator.name:20} {dtype:9} {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
