"""The TensorRT backend of the C++ library without a GPU: driver, libraries, records and kernels.

Records are compared with the Python runtime: both take the same engines and refuse the same others. If `TRT_ROOT` names
a TensorRT or TensorRT-RTX SDK (its headers suffice), the library is built with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_bundle import make_bundle
from test_engine_store import HOST, first_version, make_key, put

from arcflow_runtime import Bundle, cli
from arcflow_runtime.disk.manifest import seal
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.store import Host, find_engine
from arcflow_runtime.engines.tensorrt_library import this_platform
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu import kernel_code
from arcflow_runtime.gpu.kernels import UpdateShape, geometry
from tests.cpp import configure_cpp

ENGINE_ERROR = "3"


@pytest.fixture
def tool(trt_tool):
    return trt_tool


# The driver and the libraries.


def test_no_gpu_is_an_error(tool):
    code, said = tool("gpu")
    gpu = find_gpu()
    if gpu is not None:
        assert (code, said) == (0, f"{gpu.name} {gpu.target}")
    else:
        assert code == 1
        assert said.startswith(f"{ENGINE_ERROR} the CUDA driver finds no NVIDIA GPU here: ")


def test_platform(tool):
    assert tool("platform") == (0, this_platform())


@pytest.fixture(scope="session")
def rtx_library():
    """The shared library in TensorRT-RTX's wheel."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    import tensorrt_rtx_libs

    (library,) = Path(tensorrt_rtx_libs.__file__).parent.glob("libtensorrt_rtx.so.*")
    return library


def test_a_library_that_fits_its_headers(tool, rtx_library):
    import tensorrt_rtx

    # The version is the one that `arcflow build` writes into records.
    found = tool("library", "tensorrt-rtx", 1, 0, ARCFLOW_TENSORRT_RTX_LIBRARY=str(rtx_library))
    assert found == (0, tensorrt_rtx.__version__)
    # By its usual name, on the loader's path.
    found = tool("library", "tensorrt-rtx", 1, 0, LD_LIBRARY_PATH=str(rtx_library.parent))
    assert found == (0, tensorrt_rtx.__version__)


def test_a_library_older_than_its_headers(tool, rtx_library):
    import tensorrt_rtx

    code, said = tool("library", "tensorrt-rtx", 1, 99, ARCFLOW_TENSORRT_RTX_LIBRARY=str(rtx_library))
    assert code == 1
    assert said == (
        f"{ENGINE_ERROR} {rtx_library} is tensorrt-rtx {tensorrt_rtx.__version__}, and this library was built for "
        "1.99.0.0; install 1.99 or newer of that major version, or build this library with TRT_ROOT of the one that "
        "is installed"
    )


def test_a_library_of_the_other_flavour(tool, rtx_library):
    import tensorrt_rtx

    code, said = tool("library", "tensorrt", 11, 1, ARCFLOW_TENSORRT_LIBRARY=str(rtx_library))
    assert code == 1
    assert said == (
        f"{ENGINE_ERROR} {rtx_library} is tensorrt-rtx {tensorrt_rtx.__version__}, must be tensorrt; "
        "name the right library in ARCFLOW_TENSORRT_LIBRARY"
    )


@pytest.mark.parametrize(
    ("flavour", "name", "variable"),
    [
        ("tensorrt", "libnvinfer.so.99", "ARCFLOW_TENSORRT_LIBRARY"),
        ("tensorrt-rtx", "libtensorrt_rtx.so.99", "ARCFLOW_TENSORRT_RTX_LIBRARY"),
    ],
)
def test_a_library_that_is_not_there(tool, flavour, name, variable):
    code, said = tool("library", flavour, 99, 0)
    assert code == 1
    assert said.startswith(f"{ENGINE_ERROR} {flavour} cannot be loaded ({name}: cannot open shared object file")
    assert said.endswith(f"install it, and add its folder to LD_LIBRARY_PATH or name its file in {variable}")


def test_a_library_that_is_none_of_them(tool):
    code, said = tool("library", "tensorrt", 11, 1, ARCFLOW_TENSORRT_LIBRARY="libm.so.6")
    assert code == 1
    assert said == (
        f"{ENGINE_ERROR} libm.so.6 has no function getInferLibMajorVersion, so it is not TensorRT's library; "
        "name the right one"
    )


_LEAN = """
int getInferLibMajorVersion(void) { return 11; }
int getInferLibMinorVersion(void) { return 1; }
int getInferLibPatchVersion(void) { return 0; }
int getInferLibBuildVersion(void) { return 106; }
void *createInferRuntime_INTERNAL(void *logger, int version) { return 0; }
"""


def test_a_lean_library_cannot_fill_in_weights(tool, tmp_path):
    library, source = tmp_path / "libnvinfer_lean.so.11", tmp_path / "lean.c"
    source.write_text(_LEAN)
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, source], check=True)
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert tool("library", "tensorrt", 11, 1, **environment) == (0, "11.1.0.106")
    assert tool("refitter", "tensorrt", 11, 1, **environment) == (
        1,
        f"{ENGINE_ERROR} backbone: the engine has no weights, and libnvinfer_lean.so.11 has no function "
        "createInferRefitter_INTERNAL to fill them in, as lean libraries do not; install the whole library of "
        "tensorrt, or build the engine without --strip-weights",
    )


def test_a_whole_library_fills_in_weights(tool, rtx_library):
    assert tool("refitter", "tensorrt-rtx", 1, 0, ARCFLOW_TENSORRT_RTX_LIBRARY=str(rtx_library)) == (0, "")


# Records.


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(make_bundle(tmp_path / "bundle"))


def both(tool, bundle, host=HOST, part="backbone", check="fast"):
    """The engine for `part` that both runtimes find, or C++'s error; they must agree on whether there is one."""
    gpu = "-" if host.gpu is None else host.gpu
    code, said = tool(
        "find", bundle.root, part, host.builder, host.builder_version, host.target, gpu, host.platform, check
    )
    try:
        found = find_engine(bundle, part, host, check)
    except EngineError:
        assert code == 1 and said.startswith(f"{ENGINE_ERROR} ")
    else:
        record = found.record
        facts = (found.path, record.bytes, int(record.allocates_when_run), *(record.activation_bytes or ()))
        assert (code, said) == (0, " ".join(map(str, facts)))
    return said


def says(tool, bundle, text, **options):
    assert text in both(tool, bundle, **options)


def test_an_engine_is_found(tool, bundle):
    built = put(bundle, make_key(bundle))
    put(bundle, make_key(bundle, target="sm120"))
    put(bundle, make_key(bundle, part="vae_decoder"))
    says(tool, bundle, str(built.path), check="full")


def test_what_a_record_says_of_memory(tool, bundle):
    built = put(bundle, make_key(bundle))
    edit(bundle, lambda r: r.update(activation_bytes=[7 << 40], allocates_when_run=True))
    says(tool, bundle, f"{built.path} {built.record.bytes} 1 {7 << 40}")


def test_a_record_of_version_1_is_read(tool, bundle):
    built = put(bundle, make_key(bundle))
    first_version(bundle.root / "engines" / "backbone-tensorrt-rtx-sm89.json")
    says(tool, bundle, str(built.path))


def test_no_engine(tool, bundle):
    says(tool, bundle, "has no engine for backbone; run: arcflow build")
    put(bundle, make_key(bundle, part="vae_decoder"))
    says(tool, bundle, "has no engine for backbone; run: arcflow build")


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("builder", "tensorrt", "the engine's library must be tensorrt, got tensorrt-rtx; run: arcflow build"),
        ("builder_version", "1.8.0", "the engine's library's version must be 1.8.0, got 1.7.1"),
        ("target", "sm75", "the engine's compute capability must be sm75, got sm120, sm89"),
        ("gpu", "NVIDIA H200", "the engine's GPU must be NVIDIA H200, got none"),
        ("platform", "windows-amd64", "the engine's platform must be windows-amd64, got linux-x86_64"),
    ],
)
def test_another_machine(tool, bundle, field, value, what):
    for target in ("sm89", "sm120"):
        put(bundle, make_key(bundle, target=target)).path.unlink()  # the engine is not looked at
    says(tool, bundle, what, host=dataclasses.replace(HOST, **{field: value}))


@pytest.mark.parametrize("field", ["graph", "weights", "precision"])
def test_an_engine_of_another_bundle(tool, bundle, field):
    put(bundle, make_key(bundle, **{field: "float16" if field == "precision" else "0" * 64})).path.unlink()
    says(tool, bundle, f"the engine of backbone was built from another {field} than the bundle's")


def test_engines_that_were_damaged(tool, bundle):
    built = put(bundle, make_key(bundle), b"an engine" * 100)
    whole = built.path.read_bytes()
    built.path.write_bytes(whole[:-1])
    says(tool, bundle, "must have 900 bytes, got 899; it was cut or swapped")
    built.path.write_bytes(whole[:-1] + b"x")
    says(tool, bundle, "does not match its SHA-256; it was edited or swapped")
    built.path.unlink()
    says(tool, bundle, "is missing")
    target = bundle.root.parent / "elsewhere"
    target.write_bytes(whole)
    built.path.symlink_to(target)
    says(tool, bundle, "is missing")


def edit(bundle, change, sealed=True):
    """Change the record of the backbone's engine."""
    (path,) = (bundle.root / "engines").glob("*.json")
    record = json.loads(path.read_text())
    del record["digest"]
    change(record)
    path.write_text(json.dumps(record | {"digest": seal(record) if sealed else "0" * 64}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda r: r.update(format="arcflow-bundle"), 'format must be "arcflow-engine"; this is not an engine'),
        (lambda r: r.update(version=3), "version must be 1 or 2, got 3; build the engine again"),
        (lambda r: r.update(version="2"), 'version must be 1 or 2, got "2"'),
        (lambda r: r.pop("activation_bytes"), 'missing keys ["activation_bytes"]; build the engine again'),
        (lambda r: r.update(version=1), 'unknown keys ["activation_bytes", "allocates_when_run"]'),
        (lambda r: r.update(activation_bytes=7), "activation_bytes must be a list, got 7"),
        (lambda r: r.update(allocates_when_run=0), "allocates_when_run must be true or false, got 0"),
        (lambda r: r.update(extra=1), 'unknown keys ["extra"]; the known keys are ['),
        (lambda r: r.pop("sha256"), 'missing keys ["sha256"]; build the engine again'),
        (lambda r: r["key"].update(extra=1), 'key: unknown keys ["extra"]'),
        (lambda r: r["key"].pop("gpu"), 'key: missing keys ["gpu"]'),
        (lambda r: r.update(bytes="9"), 'bytes must be an integer of at least 0, got "9"'),
        (lambda r: r.update(bytes=-1), "bytes must be an integer of at least 0, got -1"),
        (lambda r: r["key"].update(flags="STRIP_PLAN"), 'key: flags must be a list, got "STRIP_PLAN"'),
        (lambda r: r["key"].update(target=89), "key: target must be a string, got 89"),
        (lambda r: r["key"].update(profiles=[{"latents": {"min": [1]}}]), 'missing keys ["max", "opt"]'),
        (lambda r: r["key"].update(precision="int4"), "key: precision must be one of ["),
        (lambda r: r.update(file="../engine"), 'file must be a name without a folder, got "../engine"'),
        (lambda r: r.update(file="/etc/passwd"), 'file must be a name without a folder, got "/etc/passwd"'),
        (lambda r: r.update(file=".."), 'file must be a name without a folder, got ".."'),
        (lambda r: r.update(file=""), 'file must be a name without a folder, got ""'),
    ],
)
def test_records_are_read_strictly(tool, bundle, change, what):
    put(bundle, make_key(bundle))
    edit(bundle, change)
    says(tool, bundle, what)


def test_an_edited_record(tool, bundle):
    put(bundle, make_key(bundle))
    edit(bundle, lambda r: r["key"].update(target="sm120"), sealed=False)
    says(tool, bundle, "does not match its own digest; it was edited, build the engine again")


def test_what_is_no_record(tool, bundle):
    put(bundle, make_key(bundle))
    (path,) = (bundle.root / "engines").glob("*.json")
    path.write_text("{")
    said = both(tool, bundle)
    assert said.startswith(f"{ENGINE_ERROR} {path} is not valid JSON (")
    assert said.endswith("; build the engine again with `arcflow build`")
    path.write_text(" " * ((1 << 20) + 1))
    says(tool, bundle, "is larger than 1048576 bytes; it is not an engine's record")


def test_an_engine_of_the_builder(tool, command_run, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    root = Path(shutil.copytree(command_run.bundle, tmp_path / "bundle"))
    built = ["build", root, "--backend", "tensorrt-rtx", "--target", "sm89", "--resolutions", "64", "--parts"]
    assert cli.main([*map(str, built), "conditioner"]) == 0
    bundle, host = Bundle.open(root), Host("tensorrt-rtx", trt.__version__, "sm89", None, this_platform())
    says(tool, bundle, "conditioner-tensorrt-rtx-sm89-", host=host, part="conditioner", check="full")
    other = dataclasses.replace(host, target="sm120")
    says(tool, bundle, "compute capability must be sm120, got sm89", host=other, part="conditioner")
    engine = next((root / "engines").glob("*.engine"))
    engine.write_bytes(engine.read_bytes()[: 1 << 16])
    says(tool, bundle, "it was cut or swapped", host=host, part="conditioner")


# The kernel.


@pytest.mark.parametrize("heads", ["float32", "float16"])
@pytest.mark.parametrize(("tokens", "modes", "sub_pixels"), [(1, 1, 1), (4096, 16, 4), (9, 90, 4), (33, 32, 16)])
def test_both_launch_the_kernel_the_same_way(tool, heads, tokens, modes, sub_pixels):
    shape = UpdateShape(tokens, modes, 64, sub_pixels, heads, heads)
    assert tool("geometry", tokens, modes, sub_pixels, heads) == (0, " ".join(map(str, geometry(shape))))


def test_the_launch_of_the_released_students(tool):
    # 4096 tokens of 8 threads in blocks of 128; 16 bytes, and 33 * 4 floats for each of a block's 16 tokens.
    assert tool("geometry", 4096, 16, 4, "float16") == (0, "256 128 8464")
    # 16 threads a token, and half as many tokens in a block.
    assert tool("geometry", 4096, 16, 4, "float32") == (0, "512 128 4240")
    # 401 * 4 floats for each token: 16 or 8 tokens do not fit in 48 KiB, 4 do.
    assert tool("geometry", 9, 200, 4, "float16") == (0, "3 32 25680")


def test_both_refuse_too_many_modes(tool):
    with pytest.raises(EngineError, match="the update kernel takes at most 24568 bytes per token"):
        geometry(UpdateShape(1, 4096, 64, 4, "float32", "float32"))
    assert tool("geometry", 1, 4096, 4, "float32") == (
        1,
        f"{ENGINE_ERROR} the update kernel takes at most 24568 bytes per token for its modes, got 131088 for 4096 "
        "modes of 4 sub-pixels",
    )


def test_the_embedded_source_is_pythons(tool):
    assert (
        subprocess.run([tool.path, "source"], capture_output=True, check=True).stdout.decode() == kernel_code.source()
    )


@pytest.fixture(scope="session")
def nvrtc():
    """The environment in which the library finds NVRTC."""
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    (folder,) = spec.submodule_search_locations
    return {"LD_LIBRARY_PATH": f"{folder}/lib"}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_compiled_kernels_are_cached_in_pythons_files(tool, nvrtc, tmp_path):
    """Each runtime takes what the other compiled. A damaged file is compiled again, and replaced."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed", exc_type=ImportError)
    code, said = tool("nvrtc", "sm89", tmp_path, **nvrtc)
    assert code == 0, said
    (path,) = tmp_path.glob("kernels-*.cubin")
    kept = path.read_bytes()
    assert said == f"cubin {sha256(kept[32:])}" and kept[32:36] == b"\x7fELF"
    # Python finds the same file: with other code in it, it returns that.
    other = b"\x7fELF other code"
    path.write_bytes(hashlib.sha256(other).digest() + other)
    assert kernel_code.cached_code("89", tmp_path) == ("cubin", other)
    assert tool("nvrtc", "sm89", tmp_path, **nvrtc) == (0, f"cubin {sha256(other)}")
    path.write_bytes(other)
    assert tool("nvrtc", "sm89", tmp_path, **nvrtc) == (0, said)
    assert path.read_bytes() == kept
    assert {p.suffix for p in tmp_path.iterdir()} == {".cubin", ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 40, -1])
def test_cut_kernels_are_compiled_again(size, tool, nvrtc, tmp_path):
    said = tool("nvrtc", "sm89", tmp_path, **nvrtc)
    (path,) = tmp_path.glob("kernels-*.cubin")
    kept = path.read_bytes()
    path.write_bytes(kept[:size])
    assert tool("nvrtc", "sm89", tmp_path, **nvrtc) == said
    assert path.read_bytes() == kept


@pytest.mark.slow
def test_a_gpu_newer_than_nvrtc_gets_ptx(tool, nvrtc, tmp_path):
    for _ in range(2):
        code, said = tool("nvrtc", "sm999", tmp_path, **nvrtc)
        (path,) = tmp_path.glob("kernels-*.ptx")
        assert (code, said) == (0, f"ptx {sha256(path.read_bytes()[32:])}")
        assert b".version" in path.read_bytes()


@pytest.mark.slow
def test_kernels_without_nvrtc_or_a_cache_folder(tool, nvrtc, tmp_path):
    tmp_path.joinpath("file").touch()
    path = str(tool.path)
    environment = os.environ | nvrtc
    done = subprocess.run([path, "nvrtc", "sm90", tmp_path / "file"], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("cubin ")
    assert done.stderr == f"arcflow: the compiled kernels cannot be kept in {tmp_path / 'file'}: Not a directory\n"
    assert tool("nvrtc", "sm50", **nvrtc) == (
        1,
        f"{ENGINE_ERROR} NVRTC has no architecture up to sm50; use a GPU of compute capability 7.5 or newer",
    )


def test_without_nvrtc_the_error_says_what_to_install(tool, tmp_path):
    code, said = tool("nvrtc", "sm89", tmp_path, LD_LIBRARY_PATH="")
    if code == 0:
        pytest.skip("NVRTC is installed for all programs here")
    assert said == (
        f"{ENGINE_ERROR} NVRTC, which compiles the CUDA kernels, cannot be loaded; install the CUDA toolkit's package "
        "cuda-nvrtc, or run `pip install nvidia-cuda-nvrtc` and name the folder of its libnvrtc.so in LD_LIBRARY_PATH; "
        "or build this library after runtime/kernels/build.py, which needs nvcc"
    )
    assert not [*tmp_path.iterdir()]


# With the headers of an SDK.


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A libarcflow built with the TensorRT backend, and which flavour it is for."""
    root = os.environ.get("TRT_ROOT")
    if not root:
        pytest.skip("set TRT_ROOT to a TensorRT or TensorRT-RTX SDK to build its engines")
    folder = tmp_path_factory.mktemp("cpp_trt_library")
    configure_cpp(
        folder, "-DARCFLOW_TENSORRT=ON", f"-DTRT_ROOT={root}", "-DARCFLOW_OPENVINO=OFF", "-DCMAKE_BUILD_TYPE=Debug"
    )
    subprocess.run(["cmake", "--build", folder, "--target", "arcflow"], check=True)
    version = (Path(root) / "include" / "NvInferVersion.h").read_text()
    return folder / "libarcflow.so", "tensorrt-rtx" if "TRT_MAJOR_RTX" in version else "tensorrt"


def open_bundle(library, root, backend):
    """Status and error of arcflow_open, called in a process of its own."""
    code = (
        "import ctypes, sys\n"
        "class Options(ctypes.Structure):\n"
        "    _fields_ = [('size', ctypes.c_size_t), ('backend', ctypes.c_char_p),\n"
        "                ('rest', ctypes.c_int32 * 3)]\n"
        "lib = ctypes.CDLL(sys.argv[1])\n"
        "lib.arcflow_last_error.restype = ctypes.c_char_p\n"
        "pipe = ctypes.c_void_p()\n"
        "options = Options(ctypes.sizeof(Options), sys.argv[3].encode())\n"
        "status = lib.arcflow_open(sys.argv[2].encode(), ctypes.byref(options), ctypes.byref(pipe))\n"
        "print(status, lib.arcflow_last_error().decode())\n"
    )
    command = [sys.executable, "-c", code, str(library), str(root), backend]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_gpu_is_an_error_of_the_library(library, bundle):
    path, flavour = library
    if find_gpu() is not None:
        pytest.skip("there is a GPU here")
    assert open_bundle(path, bundle.root, flavour) == (
        f"{ENGINE_ERROR} {flavour} engines run on an NVIDIA GPU, and the CUDA driver finds none here; "
        "check that nvidia-smi lists one"
    )


def test_the_other_flavours_headers(library, bundle):
    path, flavour = library
    other = "tensorrt" if flavour == "tensorrt-rtx" else "tensorrt-rtx"
    said = open_bundle(path, bundle.root, other)
    assert said.startswith(f"{ENGINE_ERROR} backend {other}: this library was built with the headers of {flavour} ")
    assert said.endswith(f"; build it with TRT_ROOT of {other}")
