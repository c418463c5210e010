"""`arcflow doctor`: what it finds on machines that lack something, and that it always says what to do."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from huggingface_hub import constants

from arcflow_export.doctor import job as job_checks
from arcflow_export.doctor import machine
from arcflow_export.doctor.findings import Finding, failure, report
from arcflow_export.doctor.libraries import check_libraries, libraries
from arcflow_export.doctor.measured import measured
from arcflow_runtime import cli
from arcflow_runtime.engines import gpus
from arcflow_runtime.engines.gpus import Driver, Gpu
from tests.hub import ARCFLOW, FLUX, Hub, release

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD, OLD_CARD = Gpu("NVIDIA RTX 4090", "sm89"), Gpu("NVIDIA Tesla V100", "sm70")
DRIVER = Driver("580.65.06", (13, 0), 25_000_000_000)


def found(findings, name):
    return next(f for f in findings if f.name == name)


def on(monkeypatch, gpu=None, driver=None):
    monkeypatch.setattr(machine, "find_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "find_driver", lambda: driver)


def installed(monkeypatch, **versions):
    """Pretend that packages have other versions; None: that they are not installed."""
    real = metadata.version

    def version(name):
        if name.replace("-", "_") not in versions:
            return real(name)
        if (told := versions[name.replace("-", "_")]) is None:
            raise metadata.PackageNotFoundError(name)
        return told

    monkeypatch.setattr(metadata, "version", version)


def test_a_machine_with_a_gpu(monkeypatch, tmp_path):
    on(monkeypatch, CARD, DRIVER)
    findings = machine.check_machine(tmp_path)
    assert found(findings, "gpu") == Finding("gpu", "ok", "NVIDIA RTX 4090, sm89, 25.0 GB")
    assert found(findings, "driver") == Finding("driver", "ok", "version 580.65.06, for CUDA up to 13.0")
    assert found(findings, "memory").state == found(findings, "disk").state == "ok"


def test_a_machine_without_a_gpu(monkeypatch, tmp_path):
    on(monkeypatch)
    assert found(machine.check_machine(tmp_path), "gpu").state == "note"
    assert found(machine.check_machine(tmp_path, "onnxruntime"), "gpu").state == "note"
    wanted = found(machine.check_machine(tmp_path, "tensorrt"), "gpu")
    assert (wanted.state, wanted.do) == ("fail", "install NVIDIA's driver for the GPU, or choose --backend onnxruntime")


def test_a_hidden_gpu_and_an_old_driver(monkeypatch, tmp_path):
    on(monkeypatch, None, Driver(None, (12, 4), 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    findings = machine.check_machine(tmp_path, "tensorrt-rtx")
    assert found(findings, "gpu") == Finding(
        "gpu",
        "fail",
        "the driver shows no GPU with CUDA_VISIBLE_DEVICES=''",
        "set CUDA_VISIBLE_DEVICES to a GPU that nvidia-smi lists",
    )
    assert found(findings, "driver") == Finding(
        "driver", "fail", "for CUDA up to 12.4", "install a driver for CUDA 13 or newer; nvidia-smi shows it"
    )


def test_a_gpu_that_the_wanted_library_does_not_run_on(monkeypatch, tmp_path):
    on(monkeypatch, OLD_CARD, DRIVER)
    line = found(machine.check_machine(tmp_path, "tensorrt-rtx"), "backend tensorrt-rtx")
    if "is not installed" not in line.found:
        assert line.found.endswith("is for sm75, sm80, sm86, sm89, sm120, sm121, and this GPU is sm70")
    assert line.state == "fail"


def test_the_driver_is_read_from_its_library(monkeypatch, tmp_path):
    """With a driver in which every function succeeds, as ctypes would load it."""

    class Cuda:
        def cuDriverGetVersion(self, number):
            number._obj.value = 13020
            return 0

        def cuInit(self, flags):
            return 0

        def cuDeviceGet(self, device, ordinal):
            return 0

        def cuDeviceTotalMem_v2(self, memory, device):
            memory._obj.value = 1 << 34
            return 0

    module = tmp_path / "version"
    module.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root)\nGCC 12.2.0\n"
    )
    monkeypatch.setattr(gpus, "_load_driver", Cuda)
    monkeypatch.setattr(gpus, "_KERNEL_MODULE", module)
    assert gpus.find_driver() == Driver("580.65.06", (13, 2), 1 << 34)
    monkeypatch.setattr(gpus, "_KERNEL_MODULE", tmp_path / "missing")
    monkeypatch.setattr(Cuda, "cuInit", lambda self, flags: 100)  # CUDA_ERROR_NO_DEVICE
    assert gpus.find_driver() == Driver(None, (13, 2), 0)


def test_libraries_are_compared_with_the_requirements(monkeypatch):
    assert [text.split()[0] for text in libraries("distill").here if "pydantic" in text] == ["pydantic"]
    assert set(libraries("export").here) < set(libraries("distill").here), "an extra's extras are followed"
    installed(monkeypatch, huggingface_hub="1.9")
    assert libraries("export").wrong == ("huggingface_hub must be <3,>=2.4, got 1.9",)
    installed(monkeypatch, huggingface_hub=None)
    line = check_libraries("export", "export", needed=True)
    assert (line.state, line.found) == ("fail", "huggingface_hub is missing")
    assert line.do == f"run: pip install -e '{ROOT}[export]'"
    assert check_libraries("export", "export", needed=False).state == "note"
    assert check_libraries("nothing", "x", needed=True).found == "the installed arcflow has no extra 'nothing'"


def test_a_failing_check_says_what_to_do():
    assert failure("x", "no such thing; make one; or two") == Finding("x", "fail", "no such thing", "make one; or two")
    assert failure("x", "no GPU: give --target").do == "give --target"
    with pytest.raises(AssertionError, match="does not say what to do"):
        Finding("x", "fail", "broken")
    assert report([Finding("a", "ok", "fine"), failure("long", "broken; mend it")]).splitlines() == [
        "ok    a     fine",
        "FAIL  long  broken",
        "            -> mend it",
    ]


def test_measurements_are_those_of_the_benchmarks():
    rehearsal = json.loads((RESULTS / "rehearsal_flux.json").read_text())["stages"]
    flux = measured("flux")
    assert {name: (s.seconds, s.peak_bytes) for name, s in flux.stages.items()} == {
        name: (row["wall_s"], row["peak_resident_bytes"]) for name, row in rehearsal.items()
    }
    planned = {name: row["planned"]["disk_bytes"] for name, row in rehearsal.items()}
    assert {name: s.disk_bytes for name, s in flux.stages.items()} == planned
    for name, known in (("flux", flux), ("qwen", measured("qwen"))):
        export = json.loads((RESULTS / f"export_{name}.json").read_text())
        assert known.download_bytes == export["checkpoint"]["bytes"]
    qwen = measured("qwen").stages["export"]
    assert (qwen.seconds, qwen.peak_bytes, qwen.disk_bytes) == (
        export["export"]["wall_s"],
        export["export"]["peak_resident_bytes"],
        export["bundle_bytes"],
    )
    assert measured("my-student") is None


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("released"), decoys=False)


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    with Hub(released) as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


FP8 = ("flux", "--precision", "fp8", "--backend", "tensorrt-rtx", "--target", "sm89")


def doctor(capsys, *words):
    code = cli.main(["doctor", *words, "--json"])
    told = json.loads(capsys.readouterr().out)
    findings = [Finding(**f) for f in told["findings"]]
    assert told["failed"] == sum(f.state == "fail" for f in findings)
    assert code == (1 if told["failed"] else 0)
    return findings


def test_a_job_whose_checkpoints_can_be_read(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job_checks, "_estimates", lambda job, before: "not here")
    findings = doctor(capsys, *FP8, "--out", str(tmp_path / "out"))
    size = sum((hub.folder / FLUX / name).stat().st_size for name in hub.files(FLUX))
    assert found(findings, "base").state == "ok"
    assert found(findings, "base").found.startswith(f"{FLUX} may be read, {size / 1e9:.1f} GB, ")
    assert found(findings, "adapter").state == "ok"
    assert found(findings, "target") == Finding("target", "ok", "sm89, with tensorrt-rtx, in fp8")
    assert found(findings, "stage export").found == "took 2.7 min and 1.5 GiB elsewhere (bfloat16)"
    assert not [name for name in hub.downloads if name.endswith(".safetensors")], "no weights are downloaded"


def test_the_licence_gate(hub, tmp_path, capsys):
    hub.gate(FLUX, "member")
    gated = Finding("base", "fail", f"{FLUX} is gated", "accept its licence on the hub and log in with `hf auth login`")
    assert found(doctor(capsys, *FP8), "base") == gated
    (tmp_path / "home" / "token").write_text("stranger")
    assert found(doctor(capsys, *FP8), "base") == gated
    assert not [name for name in hub.downloads if name.startswith(FLUX)]


def test_a_hub_that_is_not_reached_is_asked_once(hub, capsys):
    hub.stop()
    findings = doctor(capsys, *FP8)
    base = found(findings, "base")
    assert base.state == "fail" and "the hub cannot be reached ([Errno 111] Connection refused" in base.found
    assert "give --offline" in base.do
    assert found(findings, "adapter").found == f"{ARCFLOW}: not asked, see above"
    assert found(findings, "estimate").state == "note"


def test_a_hub_that_does_not_answer(hub, capsys, monkeypatch):
    """A firewall that drops what it refuses."""
    monkeypatch.setattr("arcflow_runtime.hub.repository._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        base = found(doctor(capsys, *FP8), "base")
    assert "the hub cannot be reached" in base.found and "give --offline" in base.do


def test_too_little_disk_and_memory(hub, tmp_path, capsys, monkeypatch):
    hub.gate(FLUX)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 60_000_000_000))
    monkeypatch.setattr(job_checks, "available_bytes", lambda: 16 << 30)
    findings = doctor(capsys, *FP8, "--out", str(tmp_path))
    disk = found(findings, "disk of all stages")
    # 35.0 downloaded, 33.7 exported, 25.1 quantised, 8.6 of engines, 0.1 of scales and report
    assert (disk.state, disk.found) == ("fail", f"102.5 GB needed, 60.0 GB free in {tmp_path}")
    assert disk.do.startswith(f"free 42.5 GB on the disk of {tmp_path}, or give --out")
    assert found(findings, "stage build") == Finding(
        "stage build",
        "fail",
        "took 2.3 min and 19.6 GiB elsewhere (the backbone for sm89); 16.0 GiB are free here",
        "use a machine with more memory, or try with --anyway",
    )


def test_a_job_that_cannot_be(capsys, monkeypatch):
    line = found(doctor(capsys, "flux", "--backend", "tensorrt-rtx", "--target", "sm75"), "target")
    assert line.state == "fail" and "must be built for sm80 or newer" in line.found
    monkeypatch.setattr("arcflow_export.pipeline.backend.find_gpu", lambda: None)
    line = found(doctor(capsys, "flux", "--precision", "bf16"), "job")
    assert line.found == "there is no GPU here, and ONNX Runtime has no bf16 on a CPU"
    assert line.do.startswith("give the GPU to build for, such as --target sm89")
    assert cli.main(["doctor", "flux", "--backend", "openvino"]) == 2
    assert capsys.readouterr().err == (
        "arcflow doctor: error: --backend must be one of auto, onnxruntime, tensorrt-rtx, tensorrt with a student, "
        "got 'openvino'\n"
    )


def test_without_the_extras(tmp_path):
    """In a process that can import nothing but the runtime's libraries."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'huggingface_hub', 'onnx', 'onnx_ir', 'ml_dtypes'):\n"
        "    sys.modules[name] = None\n"
        "from arcflow_runtime import cli\n"
        "sys.exit(cli.main(['doctor', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", code, *FP8, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    at = lines.index(f"FAIL base {FLUX} on the hub needs the hub's client")
    assert lines[at + 1] == f"-> run: pip install -e '{ROOT}[hub]'"


@pytest.mark.slow
def test_a_job_with_estimates(capsys, tmp_path):
    student = str(ROOT / "models" / "shapes" / "student.toml")
    findings = doctor(capsys, student, "--precision", "fp32", "--out", str(tmp_path))
    line = found(findings, "stage export")
    assert line.state == "ok" and "GiB of memory at a small server's speed" in line.found
    assert [f.name for f in findings if f.state == "fail"] == []
