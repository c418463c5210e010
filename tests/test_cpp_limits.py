"""Constants that stand in C++ and in Python: both sides are read and must be equal."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from arcflow_runtime.disk import (
    bundle,
    engine_record,
    external_data,
    families,
    manifest,
    rules,
    sealed,
    tokenizer_record,
)
from arcflow_runtime.engines import modulation
from arcflow_runtime.generate import condition, request, text
from arcflow_runtime.gpu import kernels, runtime_cache
from arcflow_runtime.lora import converted, store
from arcflow_runtime.maths import noise, schedule

HEADER = Path(__file__).parent.parent / "runtime" / "cpp" / "src" / "constants.h"
PYTHON = {
    "bundle_format": manifest.FORMAT,
    "bundle_version": manifest.PLAIN_VERSION,
    "lora_bundle_version": manifest.LORA_VERSION,
    "formats_bundle_version": manifest.FORMATS_VERSION,
    "straight_bundle_version": manifest.STRAIGHT_VERSION,
    "manifest_name": manifest.MANIFEST,
    "max_manifest_bytes": bundle.MAX_MANIFEST_BYTES,
    "fast_hash_bytes": bundle.FAST_HASH_BYTES,
    "max_graph_bytes": external_data.MAX_GRAPH_BYTES,
    "max_record_bytes": sealed.MAX_RECORD_BYTES,
    "engines_folder": manifest.ENGINES,
    "engine_format": engine_record.FORMAT,
    "engine_version": engine_record.VERSION,
    "tokenizers_folder": manifest.OPENVINO,
    "tokenizers_record": tokenizer_record.RECORD_FILE,
    "tokenizers_format": tokenizer_record.FORMAT,
    "tokenizers_version": tokenizer_record.VERSION,
    "max_runtime_cache_bytes": runtime_cache.MAX_BYTES,
    "rank_multiple": manifest.RANK_MULTIPLE,
    "max_rank": manifest.MAX_RANK,
    "modulation_name": manifest.MODULATION,
    "lora_format": converted.FORMAT,
    "lora_version": converted.VERSION,
    "max_lora_scale": request.MAX_LORA_SCALE,
    "max_true_cfg_scale": rules.MAX_TRUE_CFG_SCALE,
    "max_mu": rules.MAX_MU,
    "cached_lora_sets": store.CACHED_SETS,
    "cached_lora_bytes": store.CACHED_BYTES,
    "cached_modulations": modulation.CACHED_MODULATIONS,
    "cached_modulation_bytes": modulation.CACHED_MODULATION_BYTES,
    "changed_tables": condition.CHANGED_TABLES,
    "default_size_px": request.DEFAULT_SIZE_PX,
    "default_guidance_scale": families.DEFAULT_GUIDANCE_SCALE,
    "max_guidance_scale": request.MAX_GUIDANCE_SCALE,
    "max_inference_steps": request.MAX_INFERENCE_STEPS,
    "far_steps": request.FAR_STEPS,
    "timestep_scale": schedule.TIMESTEP_SCALE,
    "cached_prompts": text.CACHED_PROMPTS,
    "shown_characters": text._SHOWN_CHARACTERS,
}


def value(literal: str) -> object:
    """The value of a C++ literal: a string, a number, or `a << b`."""
    if shift := re.fullmatch(r"(\d+) << (\d+)", literal):
        return int(shift[1]) << int(shift[2])
    return ast.literal_eval(literal.rstrip("f"))


def constants() -> dict[str, str]:
    return dict(re.findall(r"^inline constexpr .*?(\w+) = (.*?);", HEADER.read_text(), re.MULTILINE))


def test_no_constant_is_left_out():
    assert constants().keys() == PYTHON.keys()


@pytest.mark.parametrize("name", PYTHON)
def test_constants_are_equal(name):
    assert value(constants()[name]) == PYTHON[name]


def test_the_kernels_launch_constants():
    """Python reads them from the header that C++ includes; the noise's group also stands in Python."""
    assert kernels.launch_constants() == {
        "MAX_SHARED_BYTES": 48 << 10,
        "UPDATE_THREADS": 128,
        "UPDATE_MIN_THREADS": 32,
        "UPDATE_LANES_32_BIT": 16,
        "UPDATE_LANES_16_BIT": 8,
        "UPDATE_BLOCK_BYTES": 16,
        "EULER_THREADS": 128,
        "NOISE_THREADS": 320,
        "NOISE_SHARED_BYTES": 2 * 624 * 4,
        "NOISE_GROUP": noise.GROUP,
    }
