"""Read the settings of a distillation: a preset's name or a TOML file -> a checked `Config`."""

from __future__ import annotations

import difflib
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arcflow_distill.errors import ConfigError
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=16, multiple_of=16)]
DType = Literal["float32", "bfloat16"]


class Config(BaseModel):
    """Every setting of a distillation; the defaults are those of the released FLUX student."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompts: str | None = Field(None, description="text file with one prompt per line, or 'shapes'")
    prompt_count: Positive = Field(4096, description="number of captions if prompts is 'shapes'")
    cached_prompts: int = Field(1024, ge=0, description="encode all prompts before training up to this number")
    max_sequence_length: Positive = Field(512, description="number of text tokens")
    resolutions: tuple[tuple[Side, Side], ...] = Field(
        ((1024, 1024),), min_length=1, description="[height, width] pairs; each iteration uses a random one"
    )
    guidance_scale: float = Field(
        DEFAULT_GUIDANCE_SCALE, ge=0, description="guidance input of the networks, if they have one"
    )
    true_cfg_scale: float = Field(
        1.0, ge=1, description="the teacher's classifier-free guidance scale, against the empty prompt; 1 is off"
    )

    modes: Positive = Field(16, description="K, the modes per token")
    rank: Positive = Field(256, description="rank of the LoRA factors; alpha equals the rank, so their scale is 1")
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    dtype: DType = Field("bfloat16", description="dtype of the frozen base; trained weights are float32")
    adapter_dtype: DType = Field("bfloat16", description="dtype of the written adapter")
    gradient_checkpointing: bool = True

    steps: Positive = Field(2, description="network calls per image that the student is trained for")
    intermediate_states: Positive = Field(4, description="teacher calls per step")
    substeps: Positive = Field(128, description="number of substeps between time 1 and time 0")
    window_substeps: Positive = Field(3, description="number of substeps over which the student's velocity is averaged")
    center_window: bool = Field(False, description="center the window on the teacher's point instead of starting there")
    mode_dropout: float = Field(0.1, ge=0, lt=1, description="probability that the student's walk loses a mode")
    decay_iterations: int = Field(2000, ge=0, description="iterations until the teacher's share of the walk is 0")
    loss_scale: float = Field(30.0, gt=0, description="factor for half the mean squared error")

    iterations: Positive = 10_000
    batch_size: Positive = Field(4, description="images per process and iteration")
    learning_rate: float = Field(1e-4, gt=0)
    gamma_rate: float = Field(0.1, gt=0, description="factor of the learning rate for the loggamma head")
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = Field(100, ge=0, description="iterations of linear warm-up, during which gradients are not clipped")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate schedule after the warm-up")
    grad_clip: float = Field(50.0, gt=0, description="largest norm of the gradient")
    ema_gamma: float = Field(7.0, gt=0, description="exponent of the power-law average of the weights")
    ema_start: int = Field(100, ge=0, description="first iteration of the weights' average")
    seed: int = Field(0, ge=0, lt=2**63)
    save_every: Positive = Field(500, description="iterations between training checkpoints")

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")
        if self.window_substeps * self.steps > self.substeps:
            raise ValueError(f"window_substeps must be at most substeps / steps, got {self.window_substeps}")
        return self


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def load_config(source: str, overrides: dict[str, Any] | None = None) -> Config:
    """Read a preset by its bare name, or a TOML file; a relative `prompts` path starts at the file's folder.

    Args:
        source: preset name or path.
        overrides: settings that replace the file's.

    Raises:
        ConfigError: the preset or file does not exist, is not valid TOML, or has an unknown setting or one out of
            range.
    """
    path = Path(source)
    if path.suffix != ".toml":
        if source not in presets():
            raise ConfigError(
                f"{source!r} is neither a preset nor a .toml file{_suggest(source, presets())}; "
                f"the presets are {', '.join(presets())}"
            )
        text = (_folder() / f"{source}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ConfigError(f"{source}: no such file; the presets are {', '.join(presets())}")
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{source}: not valid TOML ({e})") from None
    prompts = settings.get("prompts")
    if isinstance(prompts, str) and prompts != "shapes":
        settings["prompts"] = str(path.parent / Path(prompts).expanduser())
    return make_config(settings | (overrides or {}), source)


def make_config(settings: dict[str, Any], where: str) -> Config:
    """Make a checked configuration from settings.

    Args:
        settings: values by name.
        where: the settings' origin, for messages.

    Raises:
        ConfigError: a setting is unknown or out of range; the message names the first one.
    """
    try:
        return Config.model_validate(settings)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown setting {name!r}{_suggest(name, list(Config.model_fields))}") from None
        message = first["msg"].removeprefix("Value error, ")
        if not name:
            raise ConfigError(f"{where}: {message}") from None
        raise ConfigError(f"{where}: {name}: {message[0].lower()}{message[1:]}, got {first['input']!r}") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse `name=value` with a TOML value; a value that is not TOML is taken as a string.

    Raises:
        ConfigError: the text has no `=`.
    """
    name, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"--set: must be NAME=VALUE, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _folder() -> Any:
    return files("arcflow_distill") / "presets"


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
