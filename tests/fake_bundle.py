"""Make bundles with valid manifests but dummy graphs, and a fake backend that computes simple arithmetic for them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from arcflow_runtime.disk import manifest as b

GOLDEN = Path(__file__).parent / "golden"
#: The golden students' tokenizers as an export writes them: Hugging Face's tokenizer.json.
TOKENIZERS = {
    "flux-tiny/base/tokenizer": GOLDEN / "tokenizers" / "clip.json",
    "flux-tiny/base/tokenizer_2": GOLDEN / "tokenizers" / "t5.json",
    "qwen-tiny/base/tokenizer": GOLDEN / "tokenizers" / "qwen.json",
}
K, P, C, TEXT, POOLED, MODULATION = 3, 4, 16, 8, 6, 5


def _part(name: str, inputs: dict[str, tuple], outputs: dict[str, tuple], precision: b.DType) -> b.Part:
    def specs(tensors: dict[str, tuple]) -> tuple[b.TensorSpec, ...]:
        return tuple(b.TensorSpec(n, dtype or precision, shape) for n, (dtype, shape) in tensors.items())

    return b.Part(f"{name}.onnx", f"{name}.safetensors", precision, 7, specs(inputs), specs(outputs))


def parts(family: str, precision: b.DType = "float32", conditioner: bool = True) -> dict[str, b.Part]:
    ids = {"input_ids": ("int64", ("B", "T"))}
    states = {"encoder_hidden_states": (None, ("B", "T", TEXT))}
    found = {}
    if family == "flux":
        pooled = {"pooled_projections": (None, ("B", POOLED))}
        found["text_encoder"] = _part("text_encoder", ids, pooled, precision)
        found["text_encoder_2"] = _part("text_encoder_2", ids, states, precision)
        condition = {"timesteps": ("float32", ("S",)), "guidance": ("float32", ("B",))} | pooled
    else:
        found["text_encoder"] = _part("text_encoder", ids, states, precision)
        condition = {"timesteps": ("float32", ("S",))}
    if conditioner:
        modulation = {"modulation": (None, ("S", "B", MODULATION))}
        found["conditioner"] = _part("conditioner", condition, modulation, precision)
    rotary = {"image_rotary": ("float32", (2, "N", 16)), "text_rotary": ("float32", (2, "T", 16))}
    found["backbone"] = _part(
        "backbone",
        {"latents": (None, ("B", "N", 64))} | states | {"modulation": (None, ("B", MODULATION))} | rotary,
        {
            "means": (None, ("B", "N", K, 64)),
            "logweights": (None, ("B", "N", K, P)),
            "loggammas": (None, ("B", "N", K - 1, P)),
        },
        precision,
    )
    found["vae_decoder"] = _part(
        "vae_decoder",
        {"latents": ("float32", ("B", "h", "w", 64))},
        {"images": ("uint8", ("B", "H", "W", 3))},
        precision,
    )
    return found


def make_bundle(
    root: Path,
    family: str = "flux",
    precision: b.DType = "float32",
    baked: tuple[int, ...] = (),
    guidance=None,
) -> Path:
    """Write a bundle. With step counts in `baked`, it has a modulation table for them and no conditioner."""
    root.mkdir()
    flux = family == "flux"
    found = parts(family, precision, conditioner=not baked)
    names = {"tokenizer": "tokenizer.json"} | ({"tokenizer_2": "tokenizer_2.json"} if flux else {})
    for key, name in names.items():
        shutil.copyfile(TOKENIZERS[f"{'flux' if flux else 'qwen'}-tiny/base/{key}"], root / name)
    for name, part in found.items():
        (root / part.graph).write_text(f"graph of {name}")
        (root / part.weights).write_text(f"weights of {name}")
    if baked:
        table = {f"num_inference_steps_{n}": np.full((n, MODULATION), n, np.float32) for n in baked}
        save_file(table, root / "modulation.safetensors")
    text = b.PromptFormat(64, clip_tokens=77, clip_pad_token_id=530, t5_pad_token_id=0)
    manifest = b.Manifest(
        family=family,
        dtype=precision,
        reference_dtype="float32",
        opset=23,
        guidance=flux if guidance is None else guidance,
        schedule=b.Schedule(3.2, 1.0, 2),
        latents=b.Latents(C, 2, 8, K, P),
        rotary=b.Rotary(10000.0, (8, 12, 12)),
        text=text if flux else b.PromptFormat(64, template="<|im_start|>user\n{}<|im_end|>\n", drop_tokens=3),
        ranges=b.Ranges(b.SizeRange(1, 4), b.SizeRange(16, 256), b.SizeRange(16, 128)),
        parts=found,
        tokenizers=names,
        files={},
        provenance=b.Provenance(
            "arcflow export",
            "2026-01-01T00:00:00Z",
            {"arcflow": "0.1.0"},
            *[b.Source(n, None, "0" * 64) for n in ("base", "adapter")],
        ),
        modulation=b.ModulationTable("modulation.safetensors", baked) if baked else None,
    )
    write_manifest(root, dataclasses.replace(manifest, files=list_files(root)))
    return root


def list_files(root: Path) -> dict[str, b.FileEntry]:
    return {
        p.name: b.FileEntry(p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(root.iterdir())
        if p.name != b.MANIFEST
    }


def write_manifest(root: Path, manifest: b.Manifest) -> None:
    (root / b.MANIFEST).write_text(manifest.to_json())


def edit_manifest(root: Path, **changes: object) -> None:
    """Change keys of manifest.json and seal it again: path__to__key=value, or path__to__key=... to delete the key."""
    data = json.loads((root / b.MANIFEST).read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = data
        for key in parents:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    data.pop("digest")
    (root / b.MANIFEST).write_text(json.dumps(data | {"digest": b.seal(data)}))


class FakeEngine:
    """An engine for each part, with simple arithmetic in which each image depends only on its own inputs."""

    def __init__(self, backend: FakeBackend, part: str, family: str) -> None:
        self.backend, self.part, self.family = backend, part, family

    def run(self, inputs):
        assert self.part in self.backend.opened, "run after close"
        self.backend.runs.append((self.part, {n: x.shape for n, x in inputs.items()}))
        self.backend.inputs[self.part] = inputs
        return getattr(self, self.part)(inputs)

    def close(self) -> None:
        self.backend.opened.discard(self.part)

    def _states(self, inputs):
        ids = inputs["input_ids"].astype(np.float32) / 1000
        return {"encoder_hidden_states": np.repeat(np.cumsum(ids, 1)[:, :, None], TEXT, 2)}

    def text_encoder(self, inputs):
        if self.family != "flux":
            return self._states(inputs)
        pooled = inputs["input_ids"].sum(1, keepdims=True).astype(np.float32) / 1000
        return {"pooled_projections": np.repeat(pooled, POOLED, 1)}

    def text_encoder_2(self, inputs):
        return self._states(inputs)

    def conditioner(self, inputs):
        t = inputs["timesteps"][:, None, None] / 1000
        pooled = inputs.get("pooled_projections", np.zeros((1, POOLED), np.float32))
        return {"modulation": (t + pooled.mean(1)[None, :, None]).repeat(MODULATION, 2).astype(np.float32)}

    def backbone(self, inputs):
        x = inputs["latents"].astype(np.float32)
        text = np.tanh(inputs["encoder_hidden_states"].astype(np.float32).mean((1, 2)))[:, None, None]
        hidden = x * 0.5 + text + np.tanh(inputs["modulation"].astype(np.float32).mean(1))[:, None, None]
        hidden = hidden + inputs["image_rotary"].mean() + inputs["text_rotary"].mean()
        scale = np.arange(1, K + 1, dtype=np.float32)[None, None, :, None]
        return {
            "means": self.backend.poison * hidden[:, :, None] / scale,
            "logweights": np.sin(scale * hidden[:, :, None, :P]),
            "loggammas": np.cos(scale[:, :, 1:] * hidden[:, :, None, :P]),
        }

    def vae_decoder(self, inputs):
        x = inputs["latents"]  # [B, h, w, 64]
        pixels = np.clip(127 + 40 * x[..., :3], 0, 255).astype(np.uint8)
        return {"images": pixels.repeat(16, 1).repeat(16, 2)}


class FakeBackend:
    """A backend that records which parts were opened and run; `poison`, such as NaN, multiplies the means."""

    def __init__(self, poison: float = 1.0) -> None:
        self.opened: set[str] = set()
        self.most_open = 0
        self.opens: list[str] = []
        self.runs: list[tuple[str, dict[str, tuple[int, ...]]]] = []
        self.inputs: dict[str, dict[str, np.ndarray]] = {}
        self.poison = np.float32(poison)

    def check(self, bundle) -> None:
        pass

    def open(self, bundle, part: str) -> FakeEngine:
        self.opened.add(part)
        self.opens.append(part)
        self.most_open = max(self.most_open, len(self.opened))
        return FakeEngine(self, part, bundle.manifest.family)


def create(threads):
    """The function that `open_backend` calls in a backend's module."""
    return FakeBackend()
