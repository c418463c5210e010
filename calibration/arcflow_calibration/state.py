"""Save and load the state of a running calibration, as one safetensors file (which cannot run code when read).

For each part with L layers and S steps it holds `PART.peak`, `PART.span`, `PART.output` [L, S] float64, `PART.samples`
[L, S] int64 and, for methods with histograms, `PART.counts` [L, S, bins] int64. The metadata holds JSON: the settings,
the layers' names, and the number of batches done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from arcflow_calibration.collect import CalibratedLayer, Collector, guidance, tools
from arcflow_calibration.options import CalibrationSettings
from arcflow_calibration.ranges import BINS
from arcflow_export.errors import CalibrationError
from arcflow_export.formats.prompts import Prompts
from arcflow_export.student.load import Student
from arcflow_runtime.disk.files import hidden, locked, whole_file
from arcflow_runtime.disk.outputs import check_writable
from arcflow_runtime.lora.layers import LoraFile

_KEY = "calibration"


def state_path(out: Path) -> Path:
    """The path of the state of the calibration that writes `out`."""
    return out.with_name(f"{out.name}.state.safetensors")


def check_out(out: Path, overwrite: bool) -> None:
    """Check that `out` can be written; called before any long work.

    Raises:
        CalibrationError: `out` exists and may not be replaced, or its folder does not exist or is not writable.
    """
    if not out.absolute().parent.is_dir():
        raise CalibrationError(f"--out: {out.absolute().parent} is not a directory; create it first")
    if out.is_dir():
        raise CalibrationError(f"--out: {out} is a directory; give a file's name such as scales.json")
    if out.exists() and not overwrite:
        raise CalibrationError(f"--out: {out} exists; give another name, or --overwrite to replace it when done")
    check_writable(out, "--out", CalibrationError)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold a lock, so that no other run calibrates for the same `out`.

    Raises:
        CalibrationError: another run holds it, or the file system does not support locks.
    """
    busy = f"another run is writing {out}; wait for it or give another name"
    with locked(hidden(out, "lock"), lambda text: CalibrationError(f"--out: {text}"), busy):
        yield


def settings_of(student: Student, prompts: Prompts, settings: CalibrationSettings) -> dict[str, Any]:
    """Everything that the numbers depend on, by the name that error messages use."""
    base = [index for _, index in sorted(student.indexes.items())]
    return {
        "base": _fingerprint([path for index in base for path in index.files]),
        "adapter": None if student.adapter is None else _fingerprint(student.adapter.index.files),
        "LoRAs": [[_fingerprint(_lora_files(style.lora)), style.scale] for style in student.styles],
        "prompts": prompts.record.sha256,
        "method": settings.method,
        "percentile": settings.percentile,
        "parts": list(settings.parts),
        "num-inference-steps": settings.num_inference_steps,
        "sizes": [list(size) for size in settings.sizes],
        "guidance-scale": guidance(student, settings),
        "seed": settings.seed,
        "batch": settings.batch,
        "max-sequence-length": settings.max_sequence_length,
        "shift": settings.shift,
        "timestep-ratio": settings.timestep_ratio,
        "schedule": None if settings.straight is None else dataclasses.asdict(settings.straight),
        "negative-prompt": list(settings.negative_prompts),
        "true-cfg-scale": settings.true_cfg_scale,
        "dtype": settings.dtype,
        "device": settings.device,
        "tools": tools(),
    }


def save_state(path: Path, collector: Collector, settings: dict[str, Any], done: int) -> None:
    """Save the results of the first `done` batches; an older file stays until this one is complete."""
    tensors: dict[str, torch.Tensor] = {}
    for part, layers in collector.parts.items():
        rows = layers.values()
        tensors[f"{part}.peak"] = torch.tensor([[c.peak for c in r.calibrators] for r in rows], dtype=torch.float64)
        tensors[f"{part}.span"] = torch.tensor([[c.span for c in r.calibrators] for r in rows], dtype=torch.float64)
        tensors[f"{part}.output"] = torch.tensor([r.output_peaks for r in rows], dtype=torch.float64)
        tensors[f"{part}.samples"] = torch.tensor([r.samples for r in rows])
        if settings["method"] != "max":
            counts = [torch.stack([_counts(c.counts) for c in r.calibrators]) for r in rows]
            tensors[f"{part}.counts"] = torch.stack(counts)
    names = {part: list(layers) for part, layers in collector.parts.items()}
    facts = {"settings": settings, "layers": names, "done": done}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={_KEY: json.dumps(facts)})


def load_state(path: Path, collector: Collector, settings: dict[str, Any]) -> int:
    """Load a saved state into `collector` and return the number of batches done. Call `check_state` first.

    Raises:
        CalibrationError: the file is damaged, or its layers are not the student's.
    """
    facts = _facts(path)
    names = {part: list(layers) for part, layers in collector.parts.items()}
    done = facts.get("done")
    try:
        if facts.get("layers") != names or not isinstance(done, int) or isinstance(done, bool) or done < 1:
            raise ValueError("its layers are not the student's")
        with safe_open(path, framework="pt") as f:
            for part, layers in collector.parts.items():
                _restore(f, part, list(layers.values()), settings["method"] != "max")
    except (SafetensorError, ValueError) as e:
        raise CalibrationError(f"{path} is damaged ({e}); --overwrite starts again") from None
    return done


def check_state(path: Path, settings: dict[str, Any]) -> None:
    """Check that a saved state was made with these settings and weights.

    Raises:
        CalibrationError: settings differ (the message names all of them), or the file is damaged.
    """
    theirs = _facts(path).get("settings")
    theirs = theirs if isinstance(theirs, dict) else {}
    wrong = [_difference(name, theirs.get(name), mine) for name, mine in settings.items() if theirs.get(name) != mine]
    if wrong:
        raise CalibrationError(
            f"{path} holds a stopped run with other settings: {'; '.join(wrong)}. "
            "Give the same settings to continue it, or --overwrite to start again"
        )


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name in ("base", "adapter", "LoRAs", "prompts"):
        return f"{name} differ" if name in ("LoRAs", "prompts") else f"{name} differs"
    return f"{name} was {json.dumps(theirs)}, is {json.dumps(mine)}"


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as f:
            facts = json.loads((f.metadata() or {})[_KEY])
        if not isinstance(facts, dict):
            raise ValueError("not a JSON object")
        return facts
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as e:
        raise CalibrationError(f"{path} is not a calibration state ({e}); --overwrite starts again") from None


def _restore(f: Any, part: str, layers: list[CalibratedLayer], histograms: bool) -> None:
    shape = (len(layers), len(layers[0].calibrators))
    peak, span, output = (_tensor(f, f"{part}.{name}", shape, torch.float64) for name in ("peak", "span", "output"))
    samples = _tensor(f, f"{part}.samples", shape, torch.int64)
    counts = _tensor(f, f"{part}.counts", (*shape, BINS), torch.int64) if histograms else None
    for i, layer in enumerate(layers):
        layer.output_peaks[:], layer.samples[:] = output[i].tolist(), samples[i].tolist()
        for step, calibrator in enumerate(layer.calibrators):
            calibrator.restore(float(peak[i, step]), None if counts is None else counts[i, step], float(span[i, step]))


def _tensor(f: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = f.get_tensor(name)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    return tensor


def _counts(counts: torch.Tensor | None) -> torch.Tensor:
    assert counts is not None
    return counts


def _lora_files(lora: LoraFile) -> list[Path]:
    """The LoRA's file, and the adapter_config.json that was read with it, because that can change the LoRA's scale."""
    return [lora.path, *filter(None, [lora.config])]


def _fingerprint(paths: list[Path]) -> str:
    """A hash of names, sizes and modification times; it differs if a file was written again, even unchanged."""
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
