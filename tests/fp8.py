"""Helpers for tests of quantisation: make scales and policies, and run a part's graph to see tensors inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from arcflow_export.emulate.emulate import emulate
from arcflow_export.formats.policy import load_policy
from arcflow_export.formats.scales import ActivationRange, PromptSet, Scales
from arcflow_export.graph.linears import find_linears
from arcflow_export.quantize.quantize import plan_quantization, quantize_bundle
from arcflow_runtime import Bundle
from arcflow_runtime.maths.rotary import image_rotary, text_rotary

GRID, TEXT_TOKENS = (4, 4), 7


def linears(bundle: Bundle, part: str) -> dict:
    return find_linears(ir.load(bundle.path(bundle.manifest.parts[part].graph)))


def make_scales(bundle: Bundle, amax, parts: Iterable[str] = ("backbone",)) -> Scales:
    """Scales with range `amax(part, layer)` for each linear of `parts`; at the backbone's first step, half of that."""
    m = bundle.manifest
    found = {
        part: {
            layer: ActivationRange(
                (amax(part, layer) / 2, amax(part, layer)) if part == "backbone" else (amax(part, layer),), 1
            )
            for layer in linears(bundle, part)
        }
        for part in parts
    }
    p = m.provenance
    prompts = PromptSet("test", "0" * 64, 1)
    guidance = 3.5 if m.guidance else None
    return Scales(
        p.base, p.adapter, p.loras, m.family, "max", None, prompts, 2, ((64, 64),), guidance, 0, {"test": "1"}, found
    )


def feeds(bundle: Bundle, part: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a part, with the shapes and about the magnitudes of a 64 x 64 image."""
    random = np.random.default_rng(seed)
    m = bundle.manifest
    dims = {s.name: s.shape for s in m.parts[part].inputs}
    if part != "backbone":
        return {"input_ids": random.integers(1, 80, (1, TEXT_TOKENS))}
    return {
        "latents": random.standard_normal((1, GRID[0] * GRID[1], dims["latents"][-1]), np.float32),
        "encoder_hidden_states": random.standard_normal(
            (1, TEXT_TOKENS, dims["encoder_hidden_states"][-1]), np.float32
        ),
        "modulation": random.standard_normal((1, dims["modulation"][-1]), np.float32) / 2,
        "image_rotary": image_rotary(m.rotary, m.family, m.reference_dtype, *GRID),
        "text_rotary": text_rotary(m.rotary, m.family, m.reference_dtype, *GRID, TEXT_TOKENS),
    }


def run_graph(bundle: Bundle, part: str, inputs: dict[str, np.ndarray], inside: Iterable[str] = ()) -> dict:
    """Run a part with ONNX Runtime; bfloat16 is emulated in float32.

    Returns:
        The outputs, the values named in `inside`, and the inputs, by name.
    """
    path = bundle.path(bundle.manifest.parts[part].graph)
    with tempfile.TemporaryDirectory() as folder:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name, dtype=value.dtype)
        if any(v.dtype == ir.DataType.BFLOAT16 for v in model.graph.initializers.values()):
            model = emulate(model)
        proto = ir.to_proto(model)
        known = {v.name for v in [*proto.graph.output, *proto.graph.input]}
        types = {v.name: v for v in proto.graph.value_info}
        proto.graph.output.extend(types[name] for name in dict.fromkeys(inside) if name not in known)
        onnx.save(proto, Path(folder) / "model.onnx")
        session = ort.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    dtypes = {i.name: {"tensor(float16)": np.float16}.get(i.type) for i in session.get_inputs()}
    given = {n: inputs[n].astype(dtypes[n] or inputs[n].dtype) for n in dtypes}
    return dict(zip(names, session.run(names, given), strict=True)) | inputs


def observed_amax(bundle: Bundle, part: str) -> dict[str, float]:
    """The largest absolute input of each linear of a part on the inputs from `feeds`."""
    found = linears(bundle, part)
    values = run_graph(bundle, part, feeds(bundle, part), [linear.input.name for linear in found.values()])
    return {name: float(np.abs(values[linear.input.name]).max()) for name, linear in found.items()}


def calibrated(root: Path, parts: Iterable[str] = ("backbone",)) -> Scales:
    """Scales with the ranges observed on the inputs from `feeds`."""
    bundle = Bundle.open(root)
    seen = {part: observed_amax(bundle, part) for part in parts}
    return make_scales(bundle, lambda part, layer: seen[part][layer], parts)


def quantize(root: Path, out: Path, scales: Scales, policy: str = "flux") -> Bundle:
    return Bundle.open(quantize_bundle(plan_quantization(Bundle.open(root), scales, load_policy(policy)), out, "test"))


def write_policy(
    path: Path,
    include: Iterable[str],
    exclude: Iterable[str] = (),
    part: str = "backbone",
    usual: str = "fp8_e4m3",
    formats: Mapping[str, list[str]] | None = None,
) -> str:
    """Write a policy without thresholds; `usual` is its format, `formats` the patterns of others. Returns its path."""
    text = f'name = "test"\nformat = "{usual}"\n[parts.{part}]\ninclude = {list(include)!r}\nexclude = {list(exclude)!r}\n'
    if formats is not None:
        text += f"[parts.{part}.formats]\n" + "".join(f"{name} = {found!r}\n" for name, found in formats.items())
    path.write_text(text)
    return str(path)
