"""The settings of `arcflow calibrate` and their defaults.

Imports no heavy library, so that the command line can read the defaults quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_export.formats.scales import STEPPED, DType, Method
from arcflow_export.options import SHIFT, TIMESTEP_RATIO
from arcflow_runtime.disk.manifest import Schedule

METHODS: tuple[Method, ...] = ("max", "percentile", "mse")
DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
#: Default of --percentile: 1 value in 100,000 is clipped.
PERCENTILE = 99.999


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    `percentile` is None for other methods. `sizes` are (height, width) in pixels; prompt i has size i modulo their
    number. Prompt i starts from the noise of seed `seed` + i. A `guidance_scale` of None means the usual 3.5, or no
    guidance if the student takes none. Up to `batch` prompts of one size and text length share a network call. `shift`
    and `timestep_ratio` are the student's schedule, the same as for the export; a straight student has `straight` in
    place of both. Prompt i is guided away from negative prompt i modulo their number, with `true_cfg_scale`; without
    `negative_prompts` nothing is guided.
    """

    method: Method = "max"
    percentile: float | None = None
    parts: tuple[str, ...] = (STEPPED,)
    num_inference_steps: int = 2
    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)
    guidance_scale: float | None = None
    seed: int = 0
    batch: int = 1
    max_sequence_length: int = 512
    dtype: DType = "float32"
    device: str = "cpu"
    shift: float = SHIFT
    timestep_ratio: float = TIMESTEP_RATIO
    straight: Schedule | None = None
    negative_prompts: tuple[str, ...] = ()
    true_cfg_scale: float | None = None
