"""Compiling the kernels with nvcc and NVRTC, and the cache of the result."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu import kernel_code
from arcflow_runtime.gpu.kernels import euler_name, kernel_name
from tests.gpu.stored import DTYPES
from tests.kernel_source import ROOT

SLOW = pytest.mark.slow


def builder():
    """The module runtime/kernels/build.py."""
    spec = importlib.util.spec_from_file_location("kernel_build", ROOT / "runtime" / "kernels" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_build"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_report_is_read():
    text = """ptxas info    : Compiling entry function 'a_kernel' for 'sm_90'
ptxas info    : Function properties for a_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function 'a_kernel' for 'sm_103'
ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers
"""
    build = builder()
    report = build.parse_report(text)
    assert report == [build.Usage(90, "a_kernel", 128, 8, 16), build.Usage(103, "a_kernel", 96, 0, 0)]
    with pytest.raises(build.BuildError, match="sm_90 a_kernel: stack 8, spills 16 bytes"):
        build.check_spills(report)
    build.check_spills(report[1:])


@pytest.fixture(scope="module")
def fatbin(tmp_path_factory):
    """A folder with the fatbin of two architectures, made by build.py, and its report; CI makes the others."""
    build = builder()
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed here; it compiles the kernel in CI")
    folder = tmp_path_factory.mktemp("fatbin")
    assert build.main(["--nvcc", nvcc, "--arch", "75,90", "--out", str(folder)]) == 0  # no spills
    return folder


@pytest.mark.slow
def test_nvcc_spills_nothing(fatbin):
    assert sorted(p.name for p in fatbin.iterdir()) == ["arcflow.fatbin", "arcflow.fatbin.json"]


@pytest.mark.slow
def test_the_fatbin_is_found_for_its_source_only(fatbin, tmp_path, monkeypatch, caplog):
    for path in (ROOT / "runtime" / "kernels").glob("*.[hc]*"):
        shutil.copy(path, tmp_path)
    for path in fatbin.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(kernel_code, "kernels_folder", lambda: tmp_path)
    assert kernel_code.find_fatbin("90") == (fatbin / "arcflow.fatbin").read_bytes()
    assert kernel_code.find_fatbin("89") is None
    with (tmp_path / "update.cu").open("a") as f:
        f.write("// another\n")
    assert kernel_code.find_fatbin("90") is None
    assert "was made from another source; make it again" in caplog.text


@pytest.fixture(scope="module")
def nvrtc():
    """Skips where NVRTC is not installed; it needs no driver."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    try:
        return kernel_code.nvrtc_architectures()
    except EngineError as e:
        pytest.skip(str(e))


def test_a_missing_nvrtc_is_one_sentence(monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")

    def missing():
        raise RuntimeError("no libnvrtc.so.13\nlooked here\nand there")

    monkeypatch.setattr(nvrtc, "nvrtcGetSupportedArchs", missing)
    with pytest.raises(EngineError) as error:
        kernel_code.nvrtc_architectures()
    assert str(error.value) == (
        "NVRTC, which compiles the CUDA kernels, cannot be loaded; run: pip install nvidia-cuda-nvrtc "
        "(no libnvrtc.so.13)"
    )


@pytest.mark.parametrize("arch", [pytest.param("75", marks=SLOW), "90", pytest.param("120", marks=SLOW)])
def test_nvrtc_compiles_without_a_driver(nvrtc, arch):
    kind, code = kernel_code.compile_code(arch)
    assert kind == "cubin"
    assert code[:4] == b"\x7fELF"
    for dtype in DTYPES:
        assert f"arcflow_noise_{dtype}".encode() in code
    for heads_dtype in DTYPES:
        for input_dtype in DTYPES:
            assert kernel_name(heads_dtype, input_dtype).encode() in code
            assert euler_name(heads_dtype, input_dtype).encode() in code


def test_a_gpu_newer_than_nvrtc_gets_ptx(nvrtc, monkeypatch):
    import cuda.core

    class Program:
        """Without a driver cuda.core compiles to machine code only: it asks which PTX the driver takes."""

        def __init__(self, source, kind, options):
            self.options = options

        def compile(self, kind):
            self.code = f"{kind} of {self.options.arch}".encode()
            return self

    monkeypatch.setattr(cuda.core, "Program", Program)
    assert kernel_code.compile_code("999") == ("ptx", f"ptx of compute_{nvrtc[-1]}".encode())
    with pytest.raises(EngineError, match="NVRTC has no architecture up to compute capability 30"):
        kernel_code.compile_code("30")


def test_compiled_code_is_kept(nvrtc, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(kernel_code, "compile_code", lambda arch: calls.append(arch) or ("cubin", arch.encode()))
    folder = tmp_path / "cache"
    assert [kernel_code.cached_code("90", folder) for _ in range(2)] == [("cubin", b"90")] * 2
    assert calls == ["90"]
    assert kernel_code.cached_code("89", folder) == ("cubin", b"89")  # another architecture
    (kept,) = [p for p in folder.iterdir() if p.read_bytes().endswith(b"90")]
    kept.write_bytes(kept.read_bytes()[:-1])  # cut
    assert kernel_code.cached_code("90", folder) == ("cubin", b"90")
    monkeypatch.setattr(kernel_code, "source", lambda: "another")
    kernel_code.cached_code("90", folder)
    assert calls == ["90", "89", "90", "90"]


def test_a_cache_that_cannot_be_written_costs_time_only(nvrtc, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kernel_code, "compile_code", lambda arch: ("cubin", b"code"))
    (tmp_path / "file").touch()
    assert kernel_code.cached_code("90", tmp_path / "file" / "cache") == ("cubin", b"code")
    assert "the compiled kernels cannot be kept" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "least"),
    [
        ("arcflow_update_", 16 + 1 + 4),  # the 16 modes of the released students, latents, 4 modes of the general case
        ("arcflow_euler_", 2 + 2 + 1),  # both velocities once for the norms and once for the step, and latents
    ],
)
def test_heads_are_read_16_bytes_at_a_time(kernel, least, tmp_path):
    build = builder()
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed here")
    ptx = tmp_path / "kernels.ptx"
    command = [nvcc, "-std=c++17", "--ptx", "-arch=compute_90", str(ROOT / "runtime/kernels/euler.cu"), "-o", str(ptx)]
    subprocess.run(command, check=True)
    entries = [e for e in ptx.read_text().split(".visible .entry ")[1:] if e.startswith(kernel)]
    assert len(entries) == 9
    for entry in entries:
        assert entry.count("ld.global.v4") >= least, entry[:60]
