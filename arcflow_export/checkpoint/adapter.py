"""Read an ArcFlow adapter directory -> its config, full tensors and LoRA factors, checked against the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from arcflow_export.checkpoint.sources import Resolved, read_json
from arcflow_export.checkpoint.tensors import TensorIndex, TensorRef
from arcflow_export.errors import SourceError
from arcflow_export.families import FAMILIES, adapter_sizes, facts, family_of_adapter

HEADS = ("proj_out_means", "proj_out_logweights", "proj_out_loggamma")
#: A packed token is 2x2 latent pixels; each of the four has its own mode weights and gammas.
SUB_PIXELS = 4


@dataclass(frozen=True)
class LoraPair:
    """LoRA factors A [r, in] and B [out, r] of one linear: W' = W + scale * B A."""

    a: TensorRef
    b: TensorRef
    scale: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """A checked ArcFlow adapter: K modes, P sub-pixels, full tensors by key, LoRA factors by module."""

    family: str
    num_gaussians: int
    logweights_channels: int
    full: dict[str, TensorRef]
    loras: dict[str, LoraPair]
    index: TensorIndex
    source: Resolved

    @property
    def parameters(self) -> int:
        """Number of values stored in the adapter."""
        return sum(r.numel for r in self.index.values())


def load_adapter(source: Resolved, base_config: dict[str, Any], base: TensorIndex) -> Adapter:
    """Read an adapter and check that it belongs to this base.

    Args:
        source: the adapter's directory, with `config.json` and one safetensors.
        base_config: the base transformer's `config.json`.
        base: the base transformer's tensors.

    Raises:
        SourceError: the family or a size is wrong, a key or shape does not fit the base, or K or P does not fit the
            weights.
    """
    if not source.path.is_dir():
        raise SourceError(f"adapter: {source.path} must be a directory with config.json and one .safetensors file")
    config = read_json(source.path / "config.json", "adapter")
    family = _check_config(config, base_config, source)
    k, p = _positive(config, "num_gaussians", source), _positive(config, "logweights_channels", source)
    index = TensorIndex.open(source.path, "adapter")
    refs = {key.removeprefix("transformer."): ref for key, ref in index.items()}
    if len(refs) != len(index):
        twice = next(k for k in index if f"transformer.{k}" in index)
        raise SourceError(
            f"adapter: {source.path} has {twice!r} twice, with and without the prefix 'transformer.'; remove one"
        )
    full, loras = _split(refs, source)
    _check_heads(full, base_config, k, p, source)
    _check_fit(full, loras, base, source)
    return Adapter(family, k, p, full, loras, index, source)


def read_modes(source: Resolved) -> tuple[int, int]:
    """K modes and P sub-pixels of an adapter, from its config.

    Raises:
        SourceError: the config is missing or does not say.
    """
    config = read_json(source.path / "config.json", "adapter")
    return _positive(config, "num_gaussians", source), _positive(config, "logweights_channels", source)


def _check_config(config: dict[str, Any], base_config: dict[str, Any], source: Resolved) -> str:
    name, base_name = config.get("_class_name"), base_config.get("_class_name")
    family = family_of_adapter(name)
    if family is None:
        known = sorted(found.adapter for found in FAMILIES.values())
        raise SourceError(
            f"adapter: {source.path / 'config.json'}: _class_name must be one of {known}, got {name!r}; "
            "is this an ArcFlow adapter?"
        )
    wanted = facts(family).transformer
    if base_name != wanted:
        raise SourceError(f"adapter: {name} needs a base of class {wanted}, but the base is {base_name!r}")
    for key in adapter_sizes():
        if key in config and key in base_config and config[key] != base_config[key]:
            raise SourceError(
                f"adapter: {key} is {config[key]} in the adapter and {base_config[key]} in the base; "
                "the adapter was trained for another model"
            )
    return family


def _positive(config: dict[str, Any], key: str, source: Resolved) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SourceError(f"adapter: {source.path / 'config.json'}: {key} must be a positive integer, got {value!r}")
    return value


def _split(refs: dict[str, TensorRef], source: Resolved) -> tuple[dict[str, TensorRef], dict[str, LoraPair]]:
    full: dict[str, TensorRef] = {}
    factors: dict[str, dict[str, TensorRef]] = {}
    for key, ref in refs.items():
        if "lora" not in key:
            full[key] = ref
            continue
        for suffix in (".lora_A.weight", ".lora_B.weight"):
            if key.endswith(suffix):
                factors.setdefault(key.removesuffix(suffix), {})[suffix[6]] = ref
                break
        else:
            raise SourceError(
                f"adapter: {source.path}: LoRA key {key!r} must be '<module>.lora_A.weight' or "
                "'<module>.lora_B.weight'; is this an ArcFlow adapter?"
            )
    loras = {}
    for module, pair in sorted(factors.items()):
        if len(pair) != 2:
            missing = "B" if "A" in pair else "A"
            raise SourceError(f"adapter: {module} has no lora_{missing}; is the adapter complete?")
        loras[module] = LoraPair(pair["A"], pair["B"])
    return full, loras


def _check_heads(full: dict[str, TensorRef], base_config: dict[str, Any], k: int, p: int, source: Resolved) -> None:
    dim = base_config["num_attention_heads"] * base_config["attention_head_dim"]
    channels = base_config["in_channels"]
    if p != SUB_PIXELS:
        raise SourceError(
            f"adapter: {source.path / 'config.json'}: logweights_channels must be {SUB_PIXELS}, "
            f"one per sub-pixel of a packed token, got {p}"
        )
    rows = dict(zip(HEADS, (k * channels, k * p, (k - 1) * p), strict=True))
    for head, out in rows.items():
        for key, shape in ((f"{head}.weight", (out, dim)), (f"{head}.bias", (out,))):
            if key not in full:
                raise SourceError(f"adapter: {source.path} has no {key!r}; is this an ArcFlow adapter?")
            if full[key].shape != shape:
                raise SourceError(
                    f"adapter: {key} must have shape {list(shape)} for num_gaussians K={k} and "
                    f"logweights_channels P={p}, got {list(full[key].shape)}; config.json and weights disagree"
                )


def _check_fit(full: dict[str, TensorRef], loras: dict[str, LoraPair], base: TensorIndex, source: Resolved) -> None:
    for key, ref in full.items():
        if key in (f"{head}.{leaf}" for head in HEADS for leaf in ("weight", "bias")):
            continue
        if key in ("proj_out.weight", "proj_out.bias"):
            raise SourceError(f"adapter: {source.path}: key {key!r} belongs to a layer that the three heads replace")
        if key not in base:
            raise SourceError(
                f"adapter: {source.path}: key {key!r} does not exist in the base transformer; "
                "the adapter was trained for another model"
            )
        if ref.shape != base[key].shape:
            raise SourceError(
                f"adapter: {key} has shape {list(ref.shape)}, the base's is {list(base[key].shape)}; "
                "the adapter was trained for another model"
            )
    for module, pair in loras.items():
        if module in ("proj_out", *HEADS):
            raise SourceError(f"adapter: {source.path}: LoRA of {module!r} must not exist; the heads are full tensors")
        check_pair(module, pair, base, "adapter")


def check_pair(module: str, pair: LoraPair, base: TensorIndex, what: str, component: str = "transformer") -> None:
    """Check that one LoRA pair fits the linear `module` of the base's `component`.

    Raises:
        SourceError: the linear does not exist, or a shape does not fit.
    """
    key = f"{module}.weight"
    if key not in base:
        raise SourceError(f"{what}: LoRA target {module!r} does not exist in the base's {component}")
    if len(base[key].shape) != 2:
        raise SourceError(f"{what}: LoRA target {module!r} of the base's {component} is not a linear layer")
    (out, inp), a, b = base[key].shape, pair.a.shape, pair.b.shape
    if len(a) != 2 or len(b) != 2 or a[1] != inp or b[0] != out or a[0] != b[1]:
        raise SourceError(
            f"{what}: LoRA of {module} must be A [r, {inp}] and B [{out}, r], got A {list(a)} and B {list(b)}; "
            "it was trained for another model"
        )
