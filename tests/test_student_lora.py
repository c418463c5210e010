"""The student in torch reads LoRA files by itself: the same files as the exporter's reader, against float64."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

from arcflow_export.errors import SourceError
from arcflow_export.student.lora import read_factors
from tests.checkpoints import GOLDEN
from tests.lora_files import FILES, QWEN, File, Writer, dotted

CLASSES = {
    "flux": {
        "transformer": diffusers.FluxTransformer2DModel,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
    },
    "qwen-image": {
        "transformer": diffusers.QwenImageTransformer2DModel,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration,
    },
}
FOLDERS = {"flux": "flux-tiny", "qwen-image": "qwen-tiny"}


@pytest.fixture(scope="module")
def modules():
    """The golden networks, without weights."""
    found = {}
    for family, classes in CLASSES.items():
        base = GOLDEN / FOLDERS[family] / "base"
        with torch.device("meta"):
            found[family] = {
                component: cls.from_config(cls.load_config(base / component))
                if component == "transformer"
                else cls(cls.config_class.from_pretrained(base / component))
                for component, cls in classes.items()
            }
    return found


def plain(component: str, name: str) -> str:
    """The name of a text encoder's linear without what depends on the version of transformers."""
    if component == "transformer":
        return name
    return name[name.index("layers.") :] if "layers." in name else name


@pytest.mark.parametrize("name", FILES)
def test_against_float64(tmp_path, modules, name):
    file = FILES[name]()
    found = read_factors(file.write(tmp_path), 0.5, modules[file.family])
    changes = {
        (component, plain(component, linear)): f.b.double() @ f.a.double()
        for component, factors in found.items()
        for linear, f in factors.items()
    }
    expected = {(component, plain(component, linear)): 0.5 * d for (component, linear), d in file.expected.items()}
    if name == "the replaced projection":
        # A straight student has it. Rank and alpha are 4, the user's scale is 0.5: 4 x 1 x 0.5 everywhere.
        assert torch.equal(changes.pop(("transformer", "proj_out")), torch.full((64, 64), 2.0, dtype=torch.float64))
    assert changes.keys() == expected.keys()
    for at, wanted in expected.items():
        # A and scale * B are rounded to float32 once; the largest change times the rank bounds the sum of magnitudes.
        assert (changes[at] - wanted).abs().max() <= 3 * 2**-24 * 128 * wanted.abs().max()


def test_a_linear_that_it_does_not_know(tmp_path, modules):
    path = Writer("qwen-image").all(QWEN, dotted("transformer.")).file.write(tmp_path)
    with pytest.raises(SourceError) as error:
        read_factors(path, 1.0, modules["flux"])
    assert str(error.value).startswith(f"LoRA: {path}: the torch side knows no linear for 'transformer.")


def test_a_wrong_scale_is_not_shared_with_the_exporter(tmp_path, modules, monkeypatch):
    """The exporter's reader at half the scale leaves the torch side as it is."""
    from arcflow_runtime.lora import scales

    monkeypatch.setattr(scales.Scales, "of", lambda *_: scales.Scale(0.5, None, "wrong"))
    file: File = FILES["kohya"]()
    found = read_factors(file.write(tmp_path), 1.0, modules["flux"])["transformer"]
    assert found.keys() == {name for _, name in file.expected}
    for name, factors in found.items():
        wanted = file.expected["transformer", name]
        assert (factors.b.double() @ factors.a.double() - wanted).abs().max() <= 3 * 2**-24 * 128 * wanted.abs().max()
