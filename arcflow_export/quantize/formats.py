"""The table of number formats: name in the manifest -> the module that implements it."""

from __future__ import annotations

from collections.abc import Mapping

from arcflow_export.quantize import fp8, int8, nvfp4
from arcflow_export.quantize.format import WeightFormat
from arcflow_runtime.disk.manifest import QuantFormat

WEIGHT_FORMATS: Mapping[QuantFormat, WeightFormat] = {"fp8_e4m3": fp8, "int8": int8, "nvfp4": nvfp4}
