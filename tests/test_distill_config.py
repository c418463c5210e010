"""Presets, TOML files and their errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from arcflow_distill.errors import ConfigError
from arcflow_distill.train.config import Config, load_config, make_config, parse_setting, presets
from arcflow_runtime import cli


def test_presets():
    assert presets() == ["flux", "qwen", "shapes"]
    flux, qwen, shapes = (load_config(name) for name in presets())
    assert flux == Config()
    assert (qwen.iterations, qwen.decay_iterations, qwen.true_cfg_scale) == (15000, 1000, 4.0)
    assert (shapes.prompts, shapes.dtype, shapes.resolutions) == ("shapes", "float32", ((64, 64),))


def test_overrides_and_relative_prompts(tmp_path):
    (tmp_path / "mine.toml").write_text('prompts = "p.txt"\nrank = 8\n')
    config = load_config(str(tmp_path / "mine.toml"), {"rank": 16})
    assert (config.rank, config.prompts) == (16, str(tmp_path / "p.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"learning_rate": 0}, "learning_rate: input should be greater than 0, got 0"),
        ({"batch_size": 0}, "batch_size: input should be greater than or equal to 1, got 0"),
        ({"resolutions": [[64, 60]]}, "resolutions.0.1: input should be a multiple of 16, got 60"),
        ({"dtype": "float16"}, "dtype: input should be 'float32' or 'bfloat16', got 'float16'"),
        ({"betas": [0.9, 1.0]}, "betas must be in"),
        ({"learning_rate": float("nan")}, "learning_rate: input should be a finite number"),
        ({"window_substeps": 65}, "window_substeps must be at most substeps / steps, got 65"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError) as e:
        make_config(settings, "mine.toml")
    assert str(e.value).startswith("mine.toml: " + message)


def test_files_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'flux'"):
        load_config("flxu")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("rank 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(str(tmp_path / "bad.toml"))


def test_settings_on_the_command_line():
    assert parse_setting("learning_rate=1e-3") == ("learning_rate", 1e-3)
    assert parse_setting("schedule=cosine") == ("schedule", "cosine")
    assert parse_setting("betas=[0.9, 0.99]") == ("betas", [0.9, 0.99])
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_setting("rank")


def test_a_wrong_setting_is_bad_usage(tmp_path, capsys):
    arguments = ["flux", "--base", "none", "--out", str(tmp_path / "out"), "--set", "raank=3"]
    assert cli.main(["distill", *arguments]) == cli.BAD_USAGE
    assert "did you mean 'rank'?" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom arcflow_runtime import cli\ncli.main(['distill', '--help'])\n"
        "assert not {'torch', 'pydantic', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
