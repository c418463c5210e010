import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_bundle import FakeBackend, edit_manifest, make_bundle
from PIL import Image

from arcflow_runtime import backends, cli, installing
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.errors import EngineError
from arcflow_runtime.generate import pipeline

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def module_root(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("cli") / "bundle")


@pytest.fixture
def root(module_root, monkeypatch, tmp_path):
    monkeypatch.setitem(backends.BACKENDS, "fake", "fake_bundle")
    monkeypatch.chdir(tmp_path)
    return str(module_root)


def generate(root, *arguments):
    return cli.main(["generate", root, "a prompt", "--backend", "fake", "--height", "32", "--width", "48", *arguments])


def test_no_command_and_help(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  generate      Generate images from prompts with a bundle." in out
    assert "  bench         Time a bundle stage by stage." in out


@pytest.mark.parametrize("command", ["generate", "inspect", "bench"])
def test_help_is_the_docstring(command, capsys):
    assert cli.main([command, "--help"]) == 0
    import importlib

    doc = importlib.import_module(cli.COMMANDS[command]).__doc__
    assert doc.splitlines()[0] in capsys.readouterr().out


def test_generate_has_no_step_callback(root, monkeypatch):
    """A CUDA graph runs all steps at once, which a callback between them would prevent."""
    given = []
    plain = pipeline.Pipeline.__call__

    def call(self, *args, callback_on_step_end=None, **kwargs):
        given.append(callback_on_step_end)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(pipeline.Pipeline, "__call__", call)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for backend in ("fake", "onnxruntime"):
        monkeypatch.setitem(backends.BACKENDS, backend, "fake_bundle")
        assert generate(root, "--backend", backend, "--out", "a.png") == 0
    assert given == [None, None]


def test_a_misspelt_command(capsys):
    assert cli.main(["genrate"]) == 2
    assert capsys.readouterr().err == (
        "arcflow: error: unknown command 'genrate'; did you mean generate?\n"
        f"the commands are {', '.join(cli.COMMANDS)}\n"
    )


def test_a_misspelt_option(root, capsys):
    assert generate(root, "--hieght", "3") == 2
    assert capsys.readouterr().err.endswith(
        "arcflow generate: error: unknown argument '--hieght'; did you mean --height?\n"
    )


def test_missing_and_bad_arguments(root, capsys):
    assert cli.main(["generate", root]) == 2
    assert generate(root, "--steps", "two") == 2
    assert "argument --steps: invalid int value: 'two'" in capsys.readouterr().err
    assert generate(root, "--seed", "1,x") == 2
    assert "argument --seed: must be an integer, or several such as 1,2,3, got '1,x'" in capsys.readouterr().err


def test_generate(root, capsys):
    assert generate(root, "--out", "x.png", "--seed", "-7", "--steps", "3", "--guidance-scale", "2") == 0
    path, seed = capsys.readouterr().out.splitlines()
    assert path == "x.png"
    assert seed.startswith("seed -7, ")
    with Image.open("x.png") as image:
        assert image.size == (48, 32)
        assert image.text == {"prompt": "a prompt", "seed": "-7", "steps": "3"}
    assert os.listdir() == ["x.png"]
    assert os.stat("x.png").st_mode & 0o444 == 0o444 & ~_umask()


def test_the_memory_mode_reaches_the_pipeline(root, monkeypatch, capsys):
    modes, plain = [], pipeline.Pipeline.__init__

    def init(self, *args):
        plain(self, *args)
        modes.append(self.memory)

    monkeypatch.setattr(pipeline.Pipeline, "__init__", init)
    for mode in MODES:
        assert generate(root, "--out", "x.png", "--memory", mode) == 0
        assert cli.main(["bench", root, "--backend", "fake", "--memory", mode, "--runs", "1", "--warmup", "0"]) == 0
    assert modes == [mode for mode in MODES for _ in range(2)]
    assert generate(root, "--out", "x.png", "--memory", "none") == 2
    assert "argument --memory: invalid choice: 'none'" in capsys.readouterr().err


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_generate_several_as_json(root, capsys):
    assert generate(root, "second", "--num-images", "2", "--json", "--seed", "1") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == [f"image-{i}.png" for i in range(4)]
    assert result["seed"] == [1, 2, 3, 4]
    assert result["warnings"] == []
    assert result["timings_ms"]["total"] > 0
    with Image.open("image-2.png") as image:
        assert image.text == {"prompt": "second", "seed": "3", "steps": "2"}


@pytest.mark.parametrize("seeds", ["7", "7,-8,9,2000000000000", None])
def test_what_a_png_records_draws_it_again_alone(root, capsys, seeds):
    assert generate(root, "second", "--num-images", "2", *([f"--seed={seeds}"] if seeds else [])) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    recorded = []
    for i in range(4):
        with Image.open(f"image-{i}.png") as image:
            text, pixels = image.text, image.tobytes()
        recorded.append(text["seed"])
        command = ["generate", root, text["prompt"], "--backend", "fake", "--height", "32", "--width", "48"]
        again = [f"--seed={text['seed']}", "--steps", text["steps"], "--out", "again.png"]
        assert cli.main([*command, *again]) == 0
        with Image.open("again.png") as image:
            assert image.tobytes() == pixels
            assert image.text == text
    assert printed.startswith(f"seed {','.join(recorded)}, ")
    assert recorded == {"7": ["7", "8", "9", "10"], None: recorded}.get(seeds, (seeds or "").split(","))
    assert len(set(recorded)) == 4


def test_generate_a_sheet(root, capsys):
    assert generate(root, "second", "--sheet", "--num-images", "2", "--seed", "1", "--out", "x.png") == 0
    assert capsys.readouterr().out.splitlines()[0] == "x.png"
    with Image.open("x.png") as image:
        assert image.text["prompt"] == "a prompt\na prompt\nsecond\nsecond"
        assert image.text["seed"] == "1,2,3,4"
        assert image.width > 4 * 48
    assert os.listdir() == ["x.png"]


def test_a_picture_is_replaced_whole_or_not_at_all(root, monkeypatch, capsys):
    Path("x.png").write_text("old")

    def full(self, file, *arguments, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert generate(root, "--out", "x.png") == 1
    assert capsys.readouterr().err == "arcflow generate: error: [Errno 28] No space left on device\n"
    assert Path("x.png").read_text() == "old"
    assert os.listdir() == ["x.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/x.png"], "--out must be in a directory that exists, got 'no/x.png'; create no first"),
        (["--out", "x.jpg"], "--out must end in .png, got 'x.jpg'"),
        (["--height", "40"], "height must be a multiple of 16, got 40; the nearest is 32"),
        (["--steps", "0"], "num_inference_steps must be between 1 and 1000, got 0"),
        (["--num-images", "0"], "num_images_per_prompt must be at least 1, got 0"),
        (["--seed", "1,2"], "seed must be an integer or a list of 1, one per image, got a list of 2"),
        (["--seed", str(2**64)], f"seed[0] must be between {-(2**63)} and {2**64 - 1}, got {2**64}"),
    ],
)
def test_bad_usage(root, capsys, arguments, message):
    assert generate(root, *arguments) == 2
    assert capsys.readouterr().err == f"arcflow generate: error: {message}\n"
    assert os.listdir() == []


def test_failed_stage(root, capsys, monkeypatch):
    def fail(self, bundle, part):
        raise EngineError(f"{part}: broken")

    monkeypatch.setattr(FakeBackend, "open", fail)
    assert generate(root) == 1
    assert capsys.readouterr().err == "arcflow generate: error: text_encoder: broken\n"
    with pytest.raises(EngineError, match=r"^text_encoder: broken$"):
        generate(root, "--debug")


def test_no_bundle(root, capsys):
    assert cli.main(["generate", "nowhere", "x"]) == 1
    assert capsys.readouterr().err == (
        f"arcflow generate: error: {Path.cwd() / 'nowhere'} is not a directory; "
        "give the directory that `arcflow export --out` wrote\n"
    )


def test_interrupt(root, capsys, monkeypatch):
    def interrupt(self, bundle, part):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeBackend, "open", interrupt)
    assert generate(root) == 130
    assert capsys.readouterr().err == "arcflow generate: interrupted\n"


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("arcflow_export.commands.nothing", "[export]"),
        ("arcflow_calibration.commands.nothing", "[calibrate]"),
        ("arcflow_distill.commands.nothing", "[distill]"),
        ("no_engine", ""),
    ],
)
def test_a_package_that_is_not_installed(capsys, monkeypatch, module, extra):
    monkeypatch.setitem(cli.COMMANDS, "verify", module)
    for checkout, package in ((CHECKOUT, f"-e '{CHECKOUT}{extra}'"), (Path("/nowhere"), f"'arcflow{extra}'")):
        monkeypatch.setattr(installing, "_CHECKOUT", checkout)
        assert cli.main(["verify"]) == 1
        assert capsys.readouterr().err == (
            f"arcflow verify: error: needs {module}, which is not installed; run: pip install {package}\n"
        )


def test_openvino_is_not_installed(root, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    monkeypatch.setattr(installing, "_CHECKOUT", CHECKOUT)
    assert cli.main(["build", root, "--backend", "openvino"]) == 1
    assert capsys.readouterr().err == (
        "arcflow build: error: needs openvino_tokenizers, which is not installed; "
        f"run: pip install -e '{CHECKOUT}[openvino]'\n"
    )


def test_every_extra_that_is_named_exists():
    text = (CHECKOUT / "pyproject.toml").read_text()
    for extra in {*installing._EXTRA_OF_MODULE.values(), *installing._EXTRA_OF_PACKAGE.values()}:
        assert f"\n{extra} = [\n" in text


def test_inspect(root, capsys):
    assert cli.main(["inspect", root]) == 0
    out = capsys.readouterr().out
    assert f"{root}: flux bundle, version 1, " in out
    assert "schedule  2 steps, shift 3.2, timestep ratio 1: sigma 1.0000, 0.7619, 0.0000" in out
    assert "    latents [B, N, 64] float32" in out
    assert "    -> means [B, N, 3, 64] float32" in out
    assert out.endswith("small files match their SHA-256\n")


def test_inspect_json(root, capsys):
    assert cli.main(["inspect", root, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parts"]["backbone"]["bytes"] == len("graph of backbone") + len("weights of backbone")
    assert data["parts"]["backbone"]["parameters"] == 7
    assert data["schedule"]["sigmas"][0] == 1


def test_inspect_a_damaged_bundle(tmp_path, capsys):
    broken = make_bundle(tmp_path / "broken")
    edit_manifest(broken, version=5)
    assert cli.main(["inspect", str(broken)]) == 1
    assert capsys.readouterr().err == (
        f"arcflow inspect: error: {broken}/manifest.json: version must be 1, 2, 3 or 4, got 5; update arcflow\n"
    )
    assert cli.main(["inspect", str(tmp_path / "none"), "--check"]) == 1


def test_bench(root, capsys):
    arguments = ["--runs", "3", "--height", "32", "--width", "32", "--batch", "2", "--json", "b.json"]
    assert cli.main(["bench", root, "--backend", "fake", *arguments]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("b.json").read_text())
    assert list(report["stages_ms"])[-2:] == ["between", "total"]
    for name, spread in report["stages_ms"].items():
        assert name in out
        assert spread["p50"] <= spread["p90"] <= spread["p99"]
    assert report["stages_ms"]["encode"]["p50"] > 0
    assert report["request"]["batch"] == 2
    assert {"processor", "cores", "onnxruntime"} <= report["machine"].keys()
    assert os.listdir() == ["b.json"]


def test_bench_bad_usage(root, capsys):
    assert cli.main(["bench", root, "--runs", "0"]) == 2
    assert cli.main(["bench", root, "--json", "no/b.json"]) == 2
    assert capsys.readouterr().err == (
        "arcflow bench: error: --runs must be at least 1 and --warmup at least 0, got 0 and 2\n"
        "arcflow bench: error: --json must be in a directory that exists, got 'no/b.json'\n"
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom arcflow_runtime.cli import main\nmain(['generate', '--help'])\n"
        "assert not {'numpy', 'PIL', 'onnxruntime', 'tokenizers'} & sys.modules.keys()"
    )
    path = str(Path(__file__).parent.parent / "runtime")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONPATH": path})
