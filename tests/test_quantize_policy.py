"""Policy files: presets, strictness, and patterns that select exactly what they say."""

from __future__ import annotations

import pytest

from arcflow_export.errors import QuantizeError
from arcflow_export.families import FAMILIES
from arcflow_export.formats.policy import PartPolicy, load_policy, preset_for, presets, select
from arcflow_runtime.disk.quant_formats import BY_OPTION
from tests.fp8 import write_policy

NAMES = [
    *(f"transformer_blocks.{i}.{n}" for i in range(2) for n in ("attn.to_q", "attn.to_out.0", "ff.net.0.proj")),
    *(f"single_transformer_blocks.{i}.{n}" for i in range(2) for n in ("attn.to_q", "proj_out")),
    "x_embedder",
    "proj_out_means",
]
VALID = 'name = "t"\nformat = "fp8_e4m3"\n[parts.backbone]\ninclude = ["a.*"]\n'


def test_presets():
    fp8 = ["flux", "flux-t5", "qwen-image", "shapes"]
    others = [f"{family}-{option}" for family in ("flux", "qwen-image", "shapes") for option in ("int8", "nvfp4")]
    assert presets() == sorted(fp8 + others)
    for name in presets():
        policy = load_policy(name)
        option = name.removeprefix("qwen-image").rpartition("-")[2]
        assert (policy.name, policy.format) == (name, BY_OPTION.get(option, "fp8_e4m3"))
        assert (policy.thresholds.judge == 0.02) == name.startswith("shapes")
        assert policy.thresholds.heads == (0.2 if option == "nvfp4" else 0.05)
        if option != "int8":
            assert set(policy.parts) == ({"backbone", "text_encoder_2"} if name == "flux-t5" else {"backbone"})
    assert {preset_for(found.policy, option) for found in FAMILIES.values() for option in BY_OPTION} <= set(presets())
    assert load_policy("flux").parts == load_policy("shapes").parts


def test_only_what_is_included_is_selected():
    policy = PartPolicy(("transformer_blocks.*.attn.*", "single_transformer_blocks.*.proj_out"), ("*.1.attn.to_q",))
    assert select(policy, "backbone", NAMES) == (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.1.attn.to_out.0",
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.1.proj_out",
    )
    several = PartPolicy(("*proj_out*", "x_*"), ("*.1.proj_out", "x_*"))
    assert select(several, "backbone", NAMES) == ("single_transformer_blocks.0.proj_out", "proj_out_means")
    assert select(PartPolicy(("*",)), "backbone", NAMES) == tuple(NAMES), "nothing is left out unasked"


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (
            ["transformer_blocks.*.attn.to_w"],
            [],
            "policy: parts.backbone.include: 'transformer_blocks.*.attn.to_w' matches none of the 12 linears of "
            "backbone; similar names are 'transformer_blocks.*.attn.to_q', ",
        ),
        (
            ["*"],
            ["proj_out_mean"],
            "policy: parts.backbone.exclude: 'proj_out_mean' matches none of the 12 linears of backbone; "
            "similar names are 'proj_out_means'",
        ),
        (["x_embedder"], ["x_*"], "policy: parts.backbone excludes every linear that it includes; leave the part out"),
    ],
)
def test_patterns_that_select_nothing(include, exclude, message):
    with pytest.raises(QuantizeError) as e:
        select(PartPolicy(tuple(include), tuple(exclude)), "backbone", NAMES)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        (VALID + "[treshold]\n", "unknown keys ['treshold']"),
        (VALID.replace("fp8_e4m3", "int4"), "format must be one of ['fp8_e4m3', 'int8', 'nvfp4'], got 'int4'"),
        (VALID.replace('["a.*"]', '"a.*"'), "include must be a list, got 'a.*'"),
        (VALID.replace('["a.*"]', "[]"), "parts.backbone: include must have at least one pattern"),
        ('name = "t"\nformat = "fp8_e4m3"\n[parts]\n', "parts must name at least one part"),
        (VALID + "[thresholds]\nheads = -0.1\n", "thresholds: heads must be finite and not negative, got -0.1"),
        (VALID + "[thresholds]\npsnr = nan\n", "thresholds: psnr must be finite and not negative, got nan"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(QuantizeError) as e:
        load_policy(str(path))
    assert message in str(e.value) and str(path) in str(e.value)


def test_a_threshold_may_be_nothing(tmp_path):
    (tmp_path / "p.toml").write_text(VALID + "[thresholds]\nheads = 0\npsnr = 0.0\n")
    thresholds = load_policy(str(tmp_path / "p.toml")).thresholds
    assert (thresholds.heads, thresholds.psnr, thresholds.latents, thresholds.judge) == (0.0, 0.0, None, None)


def test_no_such_policy(tmp_path):
    with pytest.raises(QuantizeError, match=r"'flix' is neither a preset nor a \.toml file; did you mean 'flux'\?"):
        load_policy("flix")
    with pytest.raises(QuantizeError, match="is not a file; the presets are flux, "):
        load_policy(str(tmp_path / "none.toml"))


def test_the_digest_is_of_the_content(tmp_path):
    one = load_policy(write_policy(tmp_path / "1.toml", ["a"]))
    same = load_policy(write_policy(tmp_path / "2.toml", ["a"]))
    other = load_policy(write_policy(tmp_path / "3.toml", ["a"], ["b"]))
    assert one.digest() == same.digest() != other.digest()
