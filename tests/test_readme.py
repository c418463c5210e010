"""The README's example and commands run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from arcflow_runtime import cli
from tests.conftest import GOLDEN, SHAPES_OPTIONS

README = Path(__file__).parent.parent / "README.md"
#: What the walk is given in place of the shapes student, and fewer prompts; each must be there.
REPLACED = {
    "models/shapes/teacher": str(GOLDEN / "flux-tiny" / "base"),
    "models/shapes/adapter": str(GOLDEN / "flux-tiny" / "adapter"),
    "--judge models/shapes/judge": "--prompts shapes",
    "--policy shapes-int8": "--policy flux-int8",
    "--policy shapes": "",
    "--limit 256": "--limit 2",
    "--limit 64": "--limit 2",
    "--batch 8": "",
    "sm89,sm120": "sm89",
}
WALK = ("Export", "Verify", "Generate", "Serve", "FP8", "Build engines")


def commands(section: str) -> list[str]:
    """The indented lines of a section, those that end with a backslash joined with the next."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", README.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line[4:] for line in text.replace("\\\n", "").splitlines() if line.startswith("    ")]
    return [re.sub(" +", " ", line) for line in lines]


def test_example(bundles, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shapes-fp32").symlink_to(bundles("shapes", **SHAPES_OPTIONS))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open(tmp_path / "picture.png").size == (64, 64)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A function (section) that runs its commands, all in one folder."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("readme")

    def run(section: str) -> None:
        for line in commands(section):
            if "# needs a GPU" in line or "# serve until Ctrl-C" in line:
                continue
            for written, given in REPLACED.items():
                line = line.replace(written, given)
            name, *arguments = shlex.split(line, comments=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                if name == "mkdir":
                    assert arguments[0] == "-p"
                    Path(arguments[1]).mkdir(parents=True)
                    continue
                assert name == "arcflow"
                assert cli.main(arguments) == 0, line

    run.folder = folder / "out" / "walk"
    return run


@pytest.mark.slow
def test_the_walk_on_a_cpu(walk, capsys):
    for section in WALK[:-1]:
        walk(section)
    said = "runs on: ONNX Runtime and OpenVINO on a CPU, and TensorRT after `arcflow build`\n"
    assert said in capsys.readouterr().out
    again, second = (Image.open(walk.folder / f"{name}.png") for name in ("again", "image-1"))
    assert again.tobytes() == second.tobytes()
    found = sorted(p.name for p in walk.folder.iterdir())
    images = ["again.png", "circle.png", "image-0.png", "image-1.png"]
    assert found == sorted([*images, "drift", "fp32", "fp8", "int8", "scales.json"])


@pytest.mark.slow
def test_the_walk_to_engines(walk):
    pytest.importorskip("tensorrt_rtx")
    # Another of xdist's workers may have run the first sections.
    for section in WALK[:-1] if not (walk.folder / "fp8").exists() else ():
        walk(section)
    walk(WALK[-1])
    assert list((walk.folder / "fp8" / "engines").iterdir())


def test_what_the_walk_replaces_is_in_it():
    lines = "\n".join(line for section in WALK for line in commands(section))
    assert [written for written in REPLACED if written not in lines] == []
    assert len([line for line in lines.splitlines() if "# needs a GPU" in line]) == 2


def test_every_command_can_be_parsed():
    """Those too that need the hub, hours or a GPU."""
    found = [line for line in re.sub(r"\\\n *", "", README.read_text()).splitlines() if re.match(r"    arcflow ", line)]
    assert len(found) > 12
    for line in found:
        cli.check_usage(shlex.split(line, comments=True)[1:])
