"""The options of `arcflow export` and their defaults.

Imports no heavy library, so that the command line can read the defaults quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from arcflow_runtime.disk.manifest import DType, Schedule

DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
#: Short names of dtypes that the command line accepts.
SHORT_DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: Every part that a bundle may have, in the order in which data flows.
PARTS = ("text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder")
OPSETS = (20, 23)
#: Short names of patterns for `lora_slots`: the projections of all attention blocks, and every linear.
SLOT_PATTERNS = {"attn": "*attn.*", "all": "*"}
#: The schedule of the released students and of those that `arcflow distill` makes: a fixed shift that does not depend
#: on the image size, and a last step as long as the others.
SHIFT, TIMESTEP_RATIO = 3.2, 1.0
#: The step counts of the released students.
STEPS = (2,)


@dataclass(frozen=True)
class ExportOptions:
    """How to export a student.

    `opset` 20 decomposes attention and RMS norm; opset 23 has both as operators. `steps` are the step counts whose
    modulation tables are baked for Qwen-Image; the first one is the bundle's default for both families. None is
    `STEPS`, and for a straight student its schedule's own. `max_px` is
    the largest height or width and `max_sequence_length` the largest number of text tokens that the bundle accepts.

    `dtype` applies to every part that `precision` does not name. With float16 the VAE decoder stays in float32 unless
    `precision` says otherwise, because the decoders of both families overflow in float16. `keep_float32` holds
    fnmatch patterns: linears with a matching name stay in float32 in parts of reduced precision.

    `shift` and `timestep_ratio` are the schedule that the student was trained with: S and r in docs/bundle.md,
    "Schedule".

    A straight student has neither: `schedule` and `true_cfg_scale` take the place of those of the base's scheduler.

    `lora_slots` holds fnmatch patterns: linears with a matching name get a slot, two inputs that take a LoRA of rank
    `lora_max_rank` or less at each request.
    """

    dtype: DType = "float32"
    opset: int = 23
    steps: tuple[int, ...] | None = None
    keep_conditioner: bool = False
    max_px: int = 2048
    max_sequence_length: int = 512
    precision: tuple[tuple[str, DType], ...] = ()
    keep_float32: tuple[str, ...] = ()
    shift: float = SHIFT
    timestep_ratio: float = TIMESTEP_RATIO
    lora_slots: tuple[str, ...] = ()
    lora_max_rank: int = 128
    schedule: Schedule | None = None
    true_cfg_scale: float | None = None

    def part_dtype(self, part: str) -> DType:
        """The dtype of one part."""
        left = "float32" if (part, self.dtype) == ("vae_decoder", "float16") else self.dtype
        return dict(self.precision).get(part, left)

    @property
    def reference_dtype(self) -> DType:
        """The dtype that timesteps, guidance and rotary tables are rounded to.

        The students were trained in bfloat16, so a reduced-precision bundle repeats bfloat16's rounding. A bundle whose
        transformer is in float32 reproduces the float32 reference.
        """
        transformer = {self.part_dtype(part) for part in ("conditioner", "backbone")}
        return "float32" if transformer == {"float32"} else "bfloat16"
