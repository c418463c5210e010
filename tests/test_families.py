"""Families: tables agree, an unknown one is refused everywhere, and one more needs nothing but its entries."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arcflow_distill.errors import DistillError
from arcflow_distill.train.adapter import write_adapter
from arcflow_distill.train.networks import arguments as network_arguments
from arcflow_distill.train.networks import base_family, load_transformer, lora_targets
from arcflow_export import families as exporter
from arcflow_export.checkpoint.layout import read_family
from arcflow_export.checkpoint.sources import Location
from arcflow_export.checkpoint.styles import load_style
from arcflow_export.errors import SourceError
from arcflow_export.export.export import plan_export
from arcflow_export.formats.policy import presets
from arcflow_export.models import families as making
from arcflow_export.options import ExportOptions
from arcflow_export.student import families as torch_side
from arcflow_export.student.load import Outline, load_student
from arcflow_runtime import Bundle, Pipeline
from arcflow_runtime.build.profiles import make_profiles, parse_sizes
from arcflow_runtime.disk import families as runtime
from arcflow_runtime.disk import signatures
from arcflow_runtime.disk.families import Family
from arcflow_runtime.disk.manifest import Rotary, Schedule, SizeRange
from arcflow_runtime.errors import ArcFlowError, BundleError, LoraError
from arcflow_runtime.generate.encode import encode_prompts
from arcflow_runtime.generate.text import PromptTokenizer
from arcflow_runtime.gpu.shapes import conditioner_inputs
from arcflow_runtime.lora import families as lora_names
from arcflow_runtime.maths.rotary import image_rotary, text_rotary
from arcflow_runtime.maths.schedule import timesteps_of
from tests.conftest import GOLDEN, golden_student
from tests.fake_bundle import FakeBackend, make_bundle

ROOT = Path(__file__).parent.parent
TABLES = (
    runtime.FAMILIES,
    signatures.SIGNATURES,
    exporter.FAMILIES,
    making.MAKERS,
    torch_side.TORCH_FAMILIES,
    lora_names.FAMILIES,
)
#: The files that may tell families apart by name.
TABLE_FILES = {
    "runtime/arcflow_runtime/disk/families.py",
    "runtime/arcflow_runtime/disk/signatures.py",
    "runtime/arcflow_runtime/lora/families.py",
    "arcflow_export/families.py",
    "arcflow_export/models/families.py",
    "arcflow_export/student/families.py",
}


def test_tables_have_the_same_families():
    for table in TABLES:
        assert list(table) == list(get_args(Family))


@pytest.mark.parametrize("family", get_args(Family))
def test_facts_agree(family):
    facts, parts = exporter.facts(family), signatures.signatures(family)
    encoders = [name for name, s in parts.items() if s.input("input_ids") is not None]
    assert list(facts.encoders) == list(making.makers(family).encoders) == encoders
    assert {f.name for f in facts.folders if f.stem} == {*encoders, "transformer", "vae"}
    assert {f.name for f in facts.folders} >= set(runtime.facts(family).tokenizers)
    assert set(facts.pad_tokenizers.values()) <= set(runtime.facts(family).tokenizers)
    assert (facts.template is not None) == (runtime.facts(family).text == "template")
    assert facts.policy in presets()
    assert set(facts.calibrated) <= set(encoders)
    # The torch side repeats the rounding on purpose; it must be the same rounding.
    assert torch_side.torch_family(family).rounds_rotary == runtime.facts(family).rounds_rotary


@pytest.fixture(scope="module")
def flux_bundle(tmp_path_factory):
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("families") / "flux"))


def renamed(bundle: Bundle, family: str) -> Bundle:
    return Bundle(bundle.root, dataclasses.replace(bundle.manifest, family=family))


#: Everything that differs by family, called with one that is not known.
DISPATCHES = {
    "runtime facts": lambda b, _: runtime.facts("third"),
    "signatures": lambda b, _: signatures.signature("third", "backbone"),
    "encoder_of": lambda b, _: signatures.encoder_of("third", "encoder_hidden_states"),
    "bakes_modulation": lambda b, _: signatures.bakes_modulation("third"),
    "image_rotary": lambda b, _: image_rotary(Rotary(10000.0, (8, 12, 12)), "third", "float32", 2, 2),
    "text_rotary": lambda b, _: text_rotary(Rotary(10000.0, (8, 12, 12)), "third", "float32", 2, 2, 4),
    "timesteps_of": lambda b, _: timesteps_of(2, Schedule(3.2, 1.0, 2), "third", "float32"),
    "tokenizer": lambda b, _: PromptTokenizer(b),
    "encode_prompts": lambda b, _: encode_prompts(SimpleNamespace(), b.manifest, {}),
    "make_profiles": lambda b, _: make_profiles(b.manifest, "backbone", parse_sizes("64"), SizeRange(1, 1)),
    "gpu shapes": lambda b, _: conditioner_inputs(b.manifest, 1, 2),
    "lora_family": lambda b, _: lora_names.lora_family("third"),
    "open a bundle": lambda b, _: b._check_references(),
    "exporter facts": lambda b, _: exporter.facts("third"),
    "makers": lambda b, _: making.makers("third"),
    "torch_family": lambda b, _: torch_side.torch_family("third"),
    "parts": lambda b, root: Outline("third", root, {}, {}, 2, 4, {}).parts("float32"),
    "load_style": lambda b, root: load_style(Location(str(lora(root))), 1.0, "third"),
    "read_family": lambda b, root: read_family(model_index(root), "base"),
    "base_family": lambda b, root: base_family(model_index(root).parent),
    "load_transformer": lambda b, root: load_transformer(root, "third", torch.float32),
    "lora_targets": lambda b, _: lora_targets(torch.nn.Linear(1, 1), "third"),
    "network arguments": lambda b, _: network_arguments(
        SimpleNamespace(dtype=torch.float32),
        "third",
        torch.zeros(1, 1, 1),
        torch.ones(1),
        SimpleNamespace(states=torch.zeros(1, 1, 1), pooled=None, mask=None),
        SimpleNamespace(height=1, width=1, guidance_scale=1.0),
    ),
    "write_adapter": lambda b, root: write_adapter(root / "out", {}, {}, "third", 2, torch.float32, {}),
}


def lora(root: Path) -> Path:
    path = root / "lora.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 1), "transformer.x.lora_B.weight": torch.ones(1, 1)}, path)
    return path


def model_index(root: Path) -> Path:
    path = root / "model_index.json"
    path.write_text(json.dumps({"_class_name": "ThirdPipeline"}))
    return path


@pytest.mark.parametrize("name", DISPATCHES)
def test_an_unknown_family_is_refused(flux_bundle, tmp_path, name):
    with pytest.raises(ArcFlowError) as error:
        DISPATCHES[name](renamed(flux_bundle, "third"), tmp_path)
    kinds = {"base_family": DistillError, "read_family": SourceError}
    assert isinstance(error.value, kinds.get(name, (BundleError, SourceError, LoraError)))
    known = exporter.pipelines() if name in kinds else list(get_args(Family))
    assert "hird" in str(error.value) and all(k in str(error.value) for k in known)


@pytest.fixture
def third(monkeypatch):
    """A family that is FLUX by other names."""
    facts = dataclasses.replace(exporter.facts("flux"), pipeline="ThirdPipeline", adapter="ArcThirdTransformer2DModel")
    for table, entry in zip(TABLES, (runtime.facts("flux"), signatures.signatures("flux"), facts), strict=False):
        monkeypatch.setitem(table, "third", entry)
    for table in TABLES[3:]:
        monkeypatch.setitem(table, "third", table["flux"])
    return "third"


def test_a_third_family_is_generated_from_its_entries(flux_bundle, third):
    def generate(bundle):
        with Pipeline(bundle, FakeBackend()) as pipe:
            return pipe("a red circle", height=32, width=48, seed=1, output_type="latents").images

    backend = FakeBackend()
    # The fake engines answer as FLUX's; everything else goes by the third family's entries.
    backend.open = lambda bundle, part: FakeBackend.open(backend, flux_bundle, part)
    with Pipeline(renamed(flux_bundle, third), backend) as pipe:
        found = pipe("a red circle", height=32, width=48, seed=1, output_type="latents").images
    np.testing.assert_array_equal(found, generate(flux_bundle))
    profiles = [
        make_profiles(b.manifest, "backbone", parse_sizes("64"), SizeRange(1, 1))
        for b in (flux_bundle, renamed(flux_bundle, third))
    ]
    assert profiles[0] == profiles[1]


def test_a_third_family_is_planned_from_its_entries(third, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for path in (base, adapter):
        shutil.copytree(GOLDEN / "flux-tiny" / path.name, path)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "ThirdPipeline"}))
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"_class_name": "ArcThirdTransformer2DModel"}))

    student = load_student(Location(str(base)), Location(str(adapter)), [])
    assert student.family == third and student.outline.guidance
    plan, flux = plan_export(student, ExportOptions()), plan_export(golden_student("flux-tiny"), ExportOptions())
    assert [(p.part.name, p.part.inputs, p.part.outputs) for p in plan.parts] == [
        (p.part.name, p.part.inputs, p.part.outputs) for p in flux.parts
    ]
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "FourthPipeline"}))
    with pytest.raises(SourceError, match=r"_class_name must be one of \['FluxPipeline', 'QwenImage.*', 'ThirdPipel"):
        load_student(Location(str(base)), Location(str(adapter)), [])


def test_no_other_file_tells_families_apart():
    names = {*get_args(Family)}
    for facts in exporter.FAMILIES.values():
        names |= {facts.pipeline, facts.transformer, facts.adapter}
    found = []
    for package in ("arcflow_export", "runtime/arcflow_runtime", "calibration", "distillation"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = str(path.relative_to(ROOT))
            if place not in TABLE_FILES:
                found += [f"{place}:{line}" for line in _comparisons(ast.parse(path.read_text("utf-8")), names)]
    assert not found, f"compare a family's name; put what differs into a table: {found}"


def _comparisons(tree: ast.AST, names: set[str]) -> list[int]:
    """Lines that compare with one of the names, match one, or have it as a key."""
    found = []
    for node in ast.walk(tree):
        operands: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                operands += side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]
        elif isinstance(node, ast.Dict):
            operands += node.keys
        elif isinstance(node, ast.MatchValue):
            operands.append(node.value)
        if any(isinstance(o, ast.Constant) and o.value in names for o in operands):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("x = family == 'flux'", [1]),
        ("if family in ('a', 'flux'): pass", [1]),
        ("t = {'flux': 1}", [1]),
        ("match family:\n    case 'flux': pass", [2]),
        ("x = call('flux') == 2\ny = ['flux']", []),
    ],
)
def test_comparisons_are_found(code, lines):
    assert _comparisons(ast.parse(code), {"flux"}) == lines
