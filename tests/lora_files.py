"""Write LoRA files in the conventions of many tools, with the change of every linear computed here in float64.

The conventions are those of networks/lora_flux.py (kohya-ss/sd-scripts), networks/lora_qwen_image.py (musubi-tuner),
toolkit/network_mixins.py (ostris/ai-toolkit), modules/util/convert_lora_util.py (OneTrainer), weight_adapter/lora.py
(ComfyUI), and diffusers' and peft's documentation. Sizes are those of the golden checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.checkpoints import GOLDEN

RANK = 4


@dataclass
class File:
    """A LoRA file to write, and what it must change: component and linear -> float64 [out, in]."""

    family: str = "flux"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict | None = None
    expected: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def write(self, folder: Path, name: str = "style.safetensors") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in self.tensors.items()},
            folder / name,
            self.metadata or None,
        )
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder / name


def sizes(family: str, component: str) -> dict[str, tuple[int, int]]:
    """The linears of a golden checkpoint: name -> (out, in)."""
    path = next((GOLDEN / f"{family}-tiny" / "base" / component).glob("*.safetensors"))
    with safe_open(path, "pt") as f:
        shapes = {k.removesuffix(".weight"): tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
    embeddings = ("embedding", "relative_attention_bias", "shared", "lm_head", "embed_tokens")
    other = ("visual.", "proj_out") if component in ("text_encoder", "transformer") else ()
    return {
        n: s
        for n, s in shapes.items()
        if len(s) == 2 and not n.endswith(embeddings) and not n.startswith(other) and not n.endswith("bias")
    }


FLUX, QWEN = sizes("flux", "transformer"), sizes("qwen", "transformer")
CLIP, T5, VL = sizes("flux", "text_encoder"), sizes("flux", "text_encoder_2"), sizes("qwen", "text_encoder")

#: FLUX's own names -> diffusers', in the order of a fused linear's rows.
AUTHORS: dict[str, list[str]] = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
for _i in range(2):
    _d, _t = f"double_blocks.{_i}", f"transformer_blocks.{_i}"
    AUTHORS |= {
        f"{_d}.img_attn.qkv": [f"{_t}.attn.to_q", f"{_t}.attn.to_k", f"{_t}.attn.to_v"],
        f"{_d}.txt_attn.qkv": [f"{_t}.attn.add_q_proj", f"{_t}.attn.add_k_proj", f"{_t}.attn.add_v_proj"],
        f"{_d}.img_attn.proj": [f"{_t}.attn.to_out.0"],
        f"{_d}.txt_attn.proj": [f"{_t}.attn.to_add_out"],
        f"{_d}.img_mlp.0": [f"{_t}.ff.net.0.proj"],
        f"{_d}.img_mlp.2": [f"{_t}.ff.net.2"],
        f"{_d}.txt_mlp.0": [f"{_t}.ff_context.net.0.proj"],
        f"{_d}.txt_mlp.2": [f"{_t}.ff_context.net.2"],
        f"{_d}.img_mod.lin": [f"{_t}.norm1.linear"],
        f"{_d}.txt_mod.lin": [f"{_t}.norm1_context.linear"],
    }
for _i in range(3):
    _d, _t = f"single_blocks.{_i}", f"single_transformer_blocks.{_i}"
    AUTHORS |= {
        f"{_d}.linear1": [f"{_t}.attn.to_q", f"{_t}.attn.to_k", f"{_t}.attn.to_v", f"{_t}.proj_mlp"],
        f"{_d}.linear2": [f"{_t}.proj_out"],
        f"{_d}.modulation.lin": [f"{_t}.norm.linear"],
    }
assert sorted(n for names in AUTHORS.values() for n in names) == sorted(FLUX)

PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")


class Writer:
    """Adds modules to a file: random factors, and their product to the expected changes."""

    def __init__(self, family: str = "flux", dtype: torch.dtype = torch.float32, size: float = 1.0):
        self.file = File(family)
        self.dtype, self.size = dtype, size
        self._generator = torch.Generator().manual_seed(0)

    def factors(self, out: int, inp: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, already rounded to the file's dtype."""
        made = (torch.randn(s, generator=self._generator) * self.size for s in ((rank, inp), (out, rank)))
        a, b = (m.to(self.dtype) for m in made)
        return a, b

    def add(
        self,
        key: str,
        component: str,
        names: list[str],
        shapes: list[tuple[int, int]],
        *,
        alpha: float | torch.Tensor | None = None,
        strength: float | None = None,
        rank: int = RANK,
        endings: tuple[str, str] = PEFT,
        swapped: bool = False,
    ) -> None:
        """One module, fused if it has several names. `strength` is what the scale must be, else it is alpha / rank."""
        out, inp = sum(o for o, _ in shapes), shapes[0][1]
        a, b = self.factors(out, inp, rank)
        self.file.tensors |= {key + endings[0]: a, key + endings[1]: b}
        if alpha is not None:
            tensor = alpha if isinstance(alpha, torch.Tensor) else torch.tensor(float(alpha))
            self.file.tensors[f"{key}.alpha"] = tensor
            strength = float(tensor) / rank if strength is None else strength
        delta = (1.0 if strength is None else strength) * (b.double() @ a.double())
        if swapped:
            delta = torch.cat([delta[out // 2 :], delta[: out // 2]])
        for name, part in zip(names, delta.split([o for o, _ in shapes]), strict=True):
            self.file.expected[component, name] = part

    def all(self, linears: dict[str, tuple[int, int]], spell: Callable[[str], str], component="transformer", **options):
        """Every linear of a component by itself."""
        for name, shape in linears.items():
            self.add(spell(name), component, [name], [shape], **options)
        return self

    def authors(self, spell: Callable[[str], str], keep: Callable[[str], bool] = lambda _: True, **options):
        """FLUX's transformer in its authors' modules."""
        for theirs, ours in AUTHORS.items():
            if keep(theirs):
                swapped = theirs.startswith("final_layer")
                self.add(spell(theirs), "transformer", ours, [FLUX[n] for n in ours], swapped=swapped, **options)
        return self


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _attention(name: str) -> bool:
    return ".attn.to_" in name


def _some(linears: dict[str, tuple[int, int]], *parts: str) -> dict[str, tuple[int, int]]:
    return {n: s for n, s in linears.items() if any(p in n for p in parts)}


def _kohya(dtype=torch.float32, size=1.0, keep=lambda _: True, **options) -> Writer:
    return Writer(dtype=dtype, size=size).authors(flat("lora_unet_"), keep, endings=KOHYA, **({"alpha": 1.0} | options))


def _sparse() -> File:
    """sd-scripts with split_qkv: q, k, v (and mlp) have factors of their own, stored as blocks; alpha is as before."""
    w = Writer()
    for theirs, ours in AUTHORS.items():
        if len(ours) < 2:
            continue
        pairs = [w.factors(*FLUX[name], 2) for name in ours]
        key, total = flat("lora_unet_")(theirs), 2 * len(ours)
        w.file.tensors[f"{key}.lora_down.weight"] = torch.cat([a for a, _ in pairs])
        w.file.tensors[f"{key}.lora_up.weight"] = torch.block_diag(*(b for _, b in pairs))
        w.file.tensors[f"{key}.alpha"] = torch.tensor(3.0)
        for name, (a, b) in zip(ours, pairs, strict=True):
            w.file.expected["transformer", name] = 3.0 / total * (b.double() @ a.double())
    return w.file


def _xlabs() -> File:
    w = Writer()
    ending = (".down.weight", ".up.weight")
    for i in range(2):
        for theirs, number in (("img_attn", 1), ("txt_attn", 2)):
            for kind, last in (("qkv", "qkv"), ("proj", "proj")):
                ours = AUTHORS[f"double_blocks.{i}.{theirs}.{last}"]
                key = f"double_blocks.{i}.processor.{kind}_lora{number}"
                w.add(key, "transformer", ours, [FLUX[n] for n in ours], endings=ending)
    for i in range(3):
        block = f"single_transformer_blocks.{i}"
        ours = [f"{block}.attn.{n}" for n in ("to_q", "to_k", "to_v")]
        w.add(f"single_blocks.{i}.processor.qkv_lora", "transformer", ours, [FLUX[n] for n in ours], endings=ending)
        proj = f"{block}.proj_out"
        w.add(f"single_blocks.{i}.processor.proj_lora", "transformer", [proj], [FLUX[proj]], endings=ending)
    return w.file


def _fused_attention() -> File:
    w = Writer()
    for i in range(2):
        for fused, ours in (
            ("to_qkv", ("to_q", "to_k", "to_v")),
            ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            names = [f"transformer_blocks.{i}.attn.{n}" for n in ours]
            w.add(f"transformer.transformer_blocks.{i}.attn.{fused}", "transformer", names, [FLUX[n] for n in names])
    return w.file


def _ranks() -> File:
    w = Writer()
    for i, (name, shape) in enumerate(FLUX.items()):
        w.add(f"transformer.{name}", "transformer", [name], [shape], rank=1 + i % 5, alpha=0.5 + i)
    return w.file


def _metadata(metadata: dict[str, str] | None = None, config: dict | None = None, strength: float = 2.0) -> File:
    """Alpha is in no tensor. The factors' rank is 4, so alpha 8 makes a scale of 2."""
    w = Writer().all(_some(FLUX, ".attn.", "ff."), dotted("transformer."), strength=strength)
    w.file.metadata, w.file.config = metadata or {}, config
    return w.file


def _patterns(settings: dict, strengths: dict[str, float], ranks: dict[str, int] | None = None) -> File:
    """`strengths` and `ranks` by the end of a linear's name; where none fits, the scale is 1 and the rank 4."""
    w = Writer()
    for name, shape in FLUX.items():
        strength = next((s for end, s in strengths.items() if name.endswith(end)), strengths.get("", 1.0))
        rank = next((r for end, r in (ranks or {}).items() if name.endswith(end)), RANK)
        w.add(f"transformer.{name}", "transformer", [name], [shape], strength=strength, rank=rank)
    w.file.metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    return w.file


def _with(file: File, tensors: dict[str, torch.Tensor]) -> File:
    file.tensors |= tensors
    return file


def _together(*writers: Writer) -> File:
    """Several namings in one file; the tools give different linears."""
    file = writers[0].file
    for other in writers[1:]:
        assert not file.expected.keys() & other.file.expected.keys()
        file.tensors |= other.file.tensors
        file.expected |= other.file.expected
    return file


def _mixed(first: Callable[[], Writer], second: Callable[[], Writer]) -> File:
    return _together(first(), second())


def _unet(name: str) -> bool:
    return name.startswith("single")


def _double(name: str) -> bool:
    return name.startswith("double")


def _clip(spell: Callable[[str], str], **options) -> Writer:
    return Writer().all(CLIP, spell, "text_encoder", **options)


def _t5(spell: Callable[[str], str], **options) -> Writer:
    return Writer().all(T5, spell, "text_encoder_2", **options)


def _qwen(spell: Callable[[str], str], **options) -> Writer:
    return Writer("qwen-image").all(QWEN, spell, **options)


def _adapter(name: str) -> tuple[str, str]:
    return f".lora_A.{name}.weight", f".lora_B.{name}.weight"


_A8 = {"lora_alpha": 8, "r": 4}
FILES: dict[str, Callable[[], File]] = {
    # diffusers, peft, ai-toolkit
    "diffusers": lambda: Writer().all(FLUX, dotted("transformer.")).file,
    "diffusers, alpha tensors": lambda: Writer().all(FLUX, dotted("transformer."), alpha=6).file,
    "diffusers, no prefix": lambda: Writer().all(FLUX, dotted("")).file,
    "diffusers, ranks and alphas per layer": _ranks,
    "diffusers, text encoders": lambda: _mixed(
        lambda: _clip(dotted("text_encoder.")), lambda: _t5(dotted("text_encoder_2."), alpha=2)
    ),
    "diffusers, CLIP without text_model": lambda: (
        _clip(lambda n: f"text_encoder.{n.removeprefix('text_model.')}", alpha=2).file
    ),
    "diffusers, old names of CLIP": lambda: (
        _clip(dotted("text_encoder."), endings=(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")).file
    ),
    "diffusers, attention processors": lambda: (
        Writer()
        .all(
            {n: s for n, s in FLUX.items() if n.rpartition(".")[2] in ("to_q", "to_k", "to_v")},
            lambda n: f"transformer.{n.replace('.attn.', '.attn.processor.')}",
            endings=("_lora.down.weight", "_lora.up.weight"),
        )
        .file
    ),
    "diffusers, lora.down": lambda: (
        Writer().all(FLUX, dotted("transformer."), endings=(".lora.down.weight", ".lora.up.weight")).file
    ),
    "diffusers, fused projections": _fused_attention,
    "peft prefix": lambda: Writer().all(FLUX, dotted("base_model.model.")).file,
    "peft prefix and adapter name": lambda: (
        Writer().all(FLUX, dotted("base_model.model."), endings=_adapter("default")).file
    ),
    "peft adapter of another name": lambda: Writer().all(FLUX, dotted("transformer."), endings=_adapter("ink_2")).file,
    "peft prefix on the authors' names": lambda: Writer().authors(dotted("base_model.model.")).file,
    "peft without .weight": lambda: Writer().all(FLUX, dotted(""), endings=(".lora_A", ".lora_B")).file,
    "ai-toolkit": lambda: Writer(dtype=torch.float16).all(FLUX, dotted("transformer.")).file,
    "torch.compile and DistributedDataParallel": lambda: Writer().all(FLUX, dotted("module._orig_mod.")).file,
    # Kohya
    "kohya": lambda: _kohya(alpha=2).file,
    "kohya, no alpha": lambda: _kohya(alpha=None).file,
    "kohya, text encoders": lambda: _mixed(
        lambda: _kohya(), lambda: _together_writer(flat("lora_te1_"), flat("lora_te3_"))
    ),
    "kohya, bfloat16, rank 24, alpha 10": lambda: _kohya(torch.bfloat16, rank=24, alpha=10).file,
    "kohya, float16, rank 128, alpha 1, small": lambda: _kohya(torch.float16, 3e-6, _double, rank=128).file,
    "kohya, negative alpha": lambda: _kohya(alpha=-2).file,
    "kohya, alpha 0": lambda: _kohya(alpha=0).file,
    "kohya, int32 alpha": lambda: _kohya(alpha=torch.tensor(3, dtype=torch.int32)).file,
    "kohya, int64 alpha": lambda: _kohya(alpha=torch.tensor(3)).file,
    "kohya, bfloat16 alpha": lambda: _kohya(alpha=torch.tensor(3.140625, dtype=torch.bfloat16)).file,
    "kohya, float64 alpha in one dimension": lambda: _kohya(alpha=torch.tensor([0.1], dtype=torch.float64)).file,
    "kohya, split_qkv": _sparse,
    "kohya, convolution of 1 x 1": lambda: _convolutions(),
    "lycoris": lambda: Writer().all(FLUX, flat("lycoris_"), endings=KOHYA, alpha=2).file,
    # OneTrainer
    "OneTrainer, legacy": lambda: _mixed(
        lambda: Writer().all(FLUX, flat("lora_transformer_"), endings=KOHYA, alpha=2),
        lambda: _together_writer(flat("lora_te1_"), flat("lora_te2_")),
    ),
    "OneTrainer, original": lambda: Writer().authors(dotted(""), alpha=2).file,
    "OneTrainer, internal": lambda: Writer().all(FLUX, dotted("transformer."), endings=KOHYA, alpha=2).file,
    # ComfyUI, FLUX's authors, XLabs
    "ComfyUI": lambda: _mixed(
        lambda: Writer().authors(dotted("diffusion_model."), alpha=2),
        lambda: _together_writer(
            dotted("text_encoders.clip_l.transformer."), dotted("text_encoders.t5xxl.transformer."), PEFT
        ),
    ),
    "ComfyUI, Kohya's factors": lambda: Writer().authors(dotted("diffusion_model."), endings=KOHYA, alpha=2).file,
    "ComfyUI, model.diffusion_model": lambda: Writer().authors(dotted("model.diffusion_model.")).file,
    "ComfyUI, diffusers' names": lambda: Writer().all(FLUX, dotted("diffusion_model."), alpha=2).file,
    "authors": lambda: Writer().authors(dotted("")).file,
    "XLabs": _xlabs,
    # two namings in one file
    "transformer.*.lora_down and lora_te1": lambda: _mixed(
        lambda: Writer().all(FLUX, dotted("transformer."), endings=KOHYA, alpha=2),
        lambda: _clip(flat("lora_te1_"), endings=KOHYA, alpha=2),
    ),
    "lora_transformer and lora_unet": lambda: _mixed(
        lambda: Writer().all(_some(FLUX, "transformer_blocks.0.ff"), flat("lora_transformer_"), endings=KOHYA, alpha=2),
        lambda: _kohya(keep=_unet),
    ),
    "double_blocks and lora_unet": lambda: _mixed(
        lambda: Writer().authors(dotted(""), _double, endings=KOHYA, alpha=2), lambda: _kohya(keep=_unet)
    ),
    # alpha outside the tensors
    "lora_alpha in the metadata": lambda: _metadata({"lora_alpha": "8"}),
    "transformer.lora_alpha in the metadata": lambda: _metadata({"transformer.lora_alpha": "8", "transformer.r": "4"}),
    "ss_network_alpha": lambda: _metadata({"ss_network_alpha": "8.0", "ss_network_dim": "4"}),
    "lora_adapter_metadata": lambda: _metadata({"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'}),
    "lora_adapter_metadata, no component": lambda: _metadata({"lora_adapter_metadata": json.dumps(_A8)}),
    "adapter_config.json": lambda: _metadata(config=_A8 | {"peft_type": "LORA", "bias": "none", "use_dora": False}),
    "adapter_config.json, rsLoRA": lambda: _metadata(config=_A8 | {"use_rslora": True}, strength=4.0),
    "two places that agree": lambda: _metadata({"ss_network_alpha": "8"}, _A8),
    "alpha_pattern": lambda: _patterns(
        {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 2, "ff.net.2": 16}},
        {"attn.to_k": 0.5, ".ff.net.2": 4.0, "": 2.0},
    ),
    "alpha_pattern, regular expression": lambda: _patterns(
        {"r": 4, "lora_alpha": 4, "alpha_pattern": {r".*transformer_blocks\.\d+\.attn\.(to_q|to_v)": 2}},
        {"attn.to_q": 0.5, "attn.to_v": 0.5},
    ),
    "rank_pattern": lambda: _patterns(
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"proj_mlp": 2, "attn.to_q": 8}},
        {"proj_mlp": 2.0, "attn.to_q": 0.5},
        {"proj_mlp": 2, "attn.to_q": 8},
    ),
    # dtypes
    "float64": lambda: _kohya(torch.float64, alpha=2).file,
    "float8_e4m3fn": lambda: _kohya(torch.float8_e4m3fn, alpha=2).file,
    "float8_e5m2": lambda: _kohya(torch.float8_e5m2, alpha=2).file,
    # what changes nothing
    "position_ids": lambda: _with(
        _clip(dotted("text_encoder.")).file, {"text_encoder.text_model.embeddings.position_ids": torch.arange(77)[None]}
    ),
    "changes by zero": lambda: _with(
        _kohya().file,
        {
            "lora_unet_double_blocks_0_img_attn_norm_query_norm.diff": torch.zeros(32),
            "lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.zeros(64),
        },
    ),
    "the replaced projection": lambda: _with(
        _kohya().file,
        {
            "lora_unet_final_layer_linear.lora_down.weight": torch.ones(4, 64),
            "lora_unet_final_layer_linear.lora_up.weight": torch.ones(64, 4),
            "lora_unet_final_layer_linear.alpha": torch.tensor(4.0),
        },
    ),
    # Qwen-Image
    "Qwen, diffusers": lambda: _qwen(dotted("transformer.")).file,
    "Qwen, diffusers, adapter name": lambda: _qwen(dotted(""), endings=_adapter("default")).file,
    "Qwen, musubi-tuner": lambda: _qwen(flat("lora_unet_"), endings=KOHYA, alpha=2).file,
    "Qwen, ai-toolkit": lambda: _qwen(dotted("diffusion_model.")).file,
    "Qwen, Lightning": lambda: _qwen(dotted(""), endings=KOHYA, alpha=2).file,
    "Qwen, alpha tensors": lambda: _qwen(dotted("diffusion_model."), alpha=2).file,
    "Qwen, bfloat16": lambda: _bfloat16_qwen(),
    "Qwen, text encoder": lambda: (
        Writer("qwen-image")
        .all(VL, lambda n: f"text_encoder.{n.replace('model.', 'model.language_model.')}", "text_encoder", alpha=2)
        .file
    ),
    "Qwen, text encoder, old names": lambda: (
        Writer("qwen-image").all(VL, flat("lora_te_"), "text_encoder", endings=KOHYA, alpha=2).file
    ),
}


def _together_writer(clip: Callable[[str], str], t5: Callable[[str], str], endings=KOHYA) -> Writer:
    """Both text encoders of FLUX."""
    writer = _clip(clip, endings=endings, alpha=2)
    return writer.all(T5, t5, "text_encoder_2", endings=endings, alpha=3)


def _convolutions() -> File:
    file = _kohya(alpha=2).file
    file.tensors = {k: v[..., None, None] if v.ndim == 2 else v for k, v in file.tensors.items()}
    return file


def _bfloat16_qwen() -> File:
    return Writer("qwen-image", torch.bfloat16).all(QWEN, flat("lora_unet_"), endings=KOHYA, rank=24, alpha=10).file
