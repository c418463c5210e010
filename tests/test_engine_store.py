"""Engines beside a bundle: keys, records, and every way in which an engine may not fit. No builder is needed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil

import pytest
from fake_bundle import edit_manifest, list_files, make_bundle

from arcflow_runtime import Bundle, cli
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.engine_record import EngineKey, ShapeRange, part_key_fields, read_record
from arcflow_runtime.engines import gpus as gpu
from arcflow_runtime.engines import store
from arcflow_runtime.engines.gpus import Gpu, find_gpu
from arcflow_runtime.engines.store import (
    BuildReport,
    Host,
    engine_bytes,
    find_built,
    find_engine,
    locked_store,
    this_host,
    write_engine,
)
from arcflow_runtime.errors import BundleError, EngineError

HOST = Host("tensorrt-rtx", "1.7.1", "sm89", None, "linux-x86_64")
PROFILE = {"latents": ShapeRange((1, 1), (1, 2), (2, 4))}


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(make_bundle(tmp_path / "bundle"))


def make_key(bundle, part="backbone", **changes):
    fields = part_key_fields(bundle, part) | dataclasses.asdict(HOST)
    options = {"profiles": (PROFILE,), "flags": (), "optimization_level": None, "workspace_bytes": None}
    return EngineKey(**(fields | options | changes))


def put(bundle, key, content=b"an engine"):
    def build(out):
        out.write(content)
        return BuildReport(1.5, (700, 300), True)

    with locked_store(bundle):
        return write_engine(bundle, key, build)


def engines(bundle):
    folder = bundle.root / "engines"
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_written_and_found(bundle):
    key = make_key(bundle)
    put(bundle, key)
    found = find_engine(bundle, "backbone", HOST, "full")
    assert found.path.read_bytes() == b"an engine"
    assert found.record.key == key
    assert found.record.build_seconds == 1.5
    assert (found.record.activation_bytes, found.record.allocates_when_run) == ((700, 300), True)
    assert engines(bundle) == [
        f"backbone-tensorrt-rtx-sm89-{key.digest()[:16]}.engine",
        "backbone-tensorrt-rtx-sm89.json",
    ]
    # The bundle itself is as it was.
    Bundle.open(bundle.root, "full")


CHANGES = {
    "graph": ("0" * 64, r"^the graph \(\w{12} to 000000000000\)$"),
    "weights": ("0" * 64, r"^the weights \(\w{12} to 000000000000\)$"),
    "precision": ("float16", r"^precision \(float32 to float16\)$"),
    "profiles": (({"latents": ShapeRange((1, 1), (1, 2), (2, 8))},), "^the shape profile$"),
    "flags": (("REFIT_IDENTICAL", "STRIP_PLAN"), r"^flags \(none to REFIT_IDENTICAL\+STRIP_PLAN\)$"),
    "optimization_level": (0, r"^optimization_level \(none to 0\)$"),
    "workspace_bytes": (1 << 30, r"^workspace_bytes \(none to 1073741824\)$"),
    "builder_version": ("1.7.2", r"^builder_version \(1.7.1 to 1.7.2\)$"),
    "platform": ("windows-amd64", r"^platform \(linux-x86_64 to windows-amd64\)$"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_key_is_named_and_never_reused(bundle, field):
    value, message = CHANGES[field]
    key = make_key(bundle)
    put(bundle, key)
    assert find_built(bundle, key)[0] is not None
    other = make_key(bundle, **{field: value})
    assert other.digest() != key.digest()
    found, (changed,) = find_built(bundle, other)
    assert found is None
    assert re.search(message, changed)
    put(bundle, other)
    assert find_built(bundle, other)[0] is not None
    assert len(engines(bundle)) == 2, "the engine that was replaced is removed"


@pytest.mark.parametrize(
    "changes", [{"part": "vae_decoder"}, {"builder": "tensorrt"}, {"target": "sm120"}, {"gpu": "H200"}]
)
def test_engines_of_other_places_lie_side_by_side(bundle, changes):
    first, second = make_key(bundle), make_key(bundle, **changes)
    assert first.digest() != second.digest()
    put(bundle, first)
    assert find_built(bundle, second) == (None, [])
    put(bundle, second)
    assert find_built(bundle, first)[0] is not None
    assert find_built(bundle, second)[0] is not None


def test_every_field_of_the_key_is_tested():
    tested = CHANGES.keys() | {"part", "builder", "target", "gpu"}
    assert {f.name for f in dataclasses.fields(EngineKey)} == tested


def refused(bundle, message, host=HOST, part="backbone", check="fast"):
    with pytest.raises(EngineError) as e:
        find_engine(bundle, part, host, check)
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("builder", "tensorrt", "library must be tensorrt, got tensorrt-rtx"),
        ("builder_version", "1.8.0", "library's version must be 1.8.0, got 1.7.1"),
        ("target", "sm120", "compute capability must be sm120, got sm89"),
        ("gpu", "NVIDIA H200", "GPU must be NVIDIA H200, got None"),
        ("platform", "windows-amd64", "platform must be windows-amd64, got linux-x86_64"),
    ],
)
def test_another_machine_is_named_before_the_engine_is_read(bundle, field, value, what):
    built = put(bundle, make_key(bundle))
    built.path.unlink()
    host = dataclasses.replace(HOST, **{field: value})
    target = "" if host.builder == "tensorrt" else f" --target {host.target}"
    command = f"arcflow build {bundle.root} --backend {host.builder}{target} --parts backbone"
    refused(bundle, f"backbone: the engine's {what}; run: {command}", host)


COMMAND = "run: arcflow build {root} --backend tensorrt-rtx --target sm89 --parts backbone"


def test_inspect_lists_engines_and_what_is_wrong_with_them(bundle, capsys):
    key = make_key(bundle)
    put(bundle, key)
    put(bundle, make_key(bundle, "vae_decoder", graph="0" * 64))
    put(bundle, make_key(bundle, target="sm120"))
    (bundle.root / "engines" / "backbone-tensorrt-rtx-sm120.json").write_text("{}")
    assert cli.main(["inspect", str(bundle.root), "--json"]) == 0
    listed = {e["record"]: e for e in json.loads(capsys.readouterr().out)["engines"]}
    good = listed["backbone-tensorrt-rtx-sm89.json"]
    assert (good["fault"], good["part"], good["bytes"]) == (None, "backbone", len(b"an engine"))
    assert cli.main(["inspect", str(bundle.root)]) == 0
    out = capsys.readouterr().out
    assert "\n  backbone: tensorrt-rtx 1.7.1 for sm89, linux-x86_64, 9 bytes\n" in out
    assert "9 bytes; WILL NOT LOAD: built from another graph than the bundle's\n" in out
    assert "backbone-tensorrt-rtx-sm120.json: 'format' must be 'arcflow-engine'" in out


@pytest.mark.parametrize(
    ("flags", "outside"), [((), 0), (("REFIT_IDENTICAL", "STRIP_PLAN"), 1), (("WEIGHT_STREAMING",), -1)]
)
def test_what_a_loaded_engine_takes(bundle, flags, outside):
    """The weights file counts beside an engine without weights, and not where weights are streamed."""
    weights = bundle.manifest.files["backbone.safetensors"].bytes
    record = put(bundle, make_key(bundle, flags=flags), b"x" * 100).record
    taken = engine_bytes(bundle, record)
    assert taken.weights == 100 + outside * weights
    assert taken.activations == ((PROFILE, 700),)
    for shape, activations in (((1, 1), 700), ((2, 4), 700), ((3, 1), None), ((1,), None)):
        assert taken.activations_for({"latents": shape}) == activations
    assert engine_bytes(bundle, dataclasses.replace(record, activation_bytes=None)).activations == ()


def test_no_engine(bundle):
    refused(bundle, f"{bundle.root} has no engine for backbone; {COMMAND.format(root=bundle.root)}")


def test_a_stale_engine(bundle):
    put(bundle, make_key(bundle))
    (bundle.root / "backbone.safetensors").write_text("other weights")
    shutil.move(bundle.root / "engines", bundle.root.parent / "engines")
    edit_manifest(bundle.root, files={n: dataclasses.asdict(e) for n, e in list_files(bundle.root).items()})
    shutil.move(bundle.root.parent / "engines", bundle.root / "engines")
    refused(
        Bundle.open(bundle.root),
        f"{bundle.root}/engines/backbone-tensorrt-rtx-sm89.json: the engine of backbone was built from another weights "
        f"than the bundle's; {COMMAND.format(root=bundle.root)}",
    )


def test_a_damaged_engine(bundle):
    built = put(bundle, make_key(bundle))
    what = f"{built.path}, the tensorrt-rtx engine of backbone for sm89,"
    again = "build it again with `arcflow build`"
    built.path.write_bytes(b"an engin")
    refused(bundle, f"{what} must have 9 bytes, got 8; it was cut or swapped, {again}")
    built.path.write_bytes(b"AN ENGINE")
    refused(bundle, f"{what} does not match its SHA-256; it was edited or swapped, {again}")
    found, (changed,) = find_built(bundle, built.record.key)
    assert found is None
    assert changed.startswith("the engine is damaged (")
    built.path.unlink()
    refused(bundle, f"{what} is missing; {again}")


def test_swapped_engines(bundle):
    first = put(bundle, make_key(bundle), b"engine one")
    second = put(bundle, make_key(bundle, "vae_decoder"), b"engine two")
    content = first.path.read_bytes(), second.path.read_bytes()
    first.path.write_bytes(content[1])
    second.path.write_bytes(content[0])
    for part in ("backbone", "vae_decoder"):
        with pytest.raises(
            EngineError, match=f"the tensorrt-rtx engine of {part} for sm89, does not match its SHA-256"
        ):
            find_engine(bundle, part, HOST)


def test_an_engine_of_another_bundle(bundle, tmp_path):
    other = Bundle.open(make_bundle(tmp_path / "other"))
    put(other, make_key(other, graph="0" * 64), b"a foreign engine")
    shutil.copytree(other.root / "engines", bundle.root / "engines")
    with pytest.raises(
        EngineError, match=r"sm89.json: the engine of backbone was built from another graph than the bund"
    ):
        find_engine(bundle, "backbone", HOST)
    # Beside the bundle's own it is passed over.
    foreign = bundle.root / "engines" / "a-foreign.json"
    (bundle.root / "engines" / "backbone-tensorrt-rtx-sm89.json").rename(foreign)
    put(bundle, make_key(bundle))
    assert find_engine(bundle, "backbone", HOST).path.read_bytes() == b"an engine"


def test_a_large_engine_is_hashed_when_asked(bundle, monkeypatch):
    monkeypatch.setattr(store, "FAST_HASH_BYTES", 4)
    built = put(bundle, make_key(bundle))
    built.path.write_bytes(b"AN ENGINE")
    assert find_engine(bundle, "backbone", HOST).path == built.path
    with pytest.raises(EngineError, match="does not match its SHA-256"):
        find_engine(bundle, "backbone", HOST, "full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "'format' must be 'arcflow-engine'; this is not an engine's record, remove it"),
        ('{"format": "arcflow-engine", "version": 3}', "version must be 1 or 2, got 3; build the engine again"),
        ('{"format": "arcflow-engine", "version": []}', r"version must be 1 or 2, got \[\]; build the engine again"),
        ('{"format": "arcflow-engine", "version": 2}', "missing keys"),
        ('{"format": "arcflow-engine", "version": 1}', "missing keys"),
        ("[" * 100_000, "is not valid JSON"),
        (" " * (1 << 20) + "{}", "is larger than 1048576 bytes"),
    ],
)
def test_damaged_records(bundle, text, message):
    built = put(bundle, make_key(bundle))
    record = bundle.root / "engines" / "backbone-tensorrt-rtx-sm89.json"
    record.write_text(text)
    with pytest.raises(EngineError, match=message):
        find_engine(bundle, "backbone", HOST)
    # Building again repairs it.
    assert find_built(bundle, built.record.key)[0] is None
    put(bundle, built.record.key)
    assert find_engine(bundle, "backbone", HOST).path == built.path


def test_an_engine_whose_record_is_damaged_is_no_orphan(bundle):
    """A damaged record no longer says which engine it names, so building another engine must remove none."""
    first = put(bundle, make_key(bundle), b"engine one")
    record = bundle.root / "engines" / "backbone-tensorrt-rtx-sm89.json"
    record.write_text("{")
    second = put(bundle, make_key(bundle, "vae_decoder"), b"engine two")
    assert first.path.read_bytes() == b"engine one" and second.path.read_bytes() == b"engine two"
    # Once every record can be read, an engine that none of them names is removed.
    put(bundle, make_key(bundle, platform="other"), b"engine three")
    assert not first.path.exists() and second.path.exists()


def edit_record(path, seal, **changes):
    data = json.loads(path.read_text()) | changes
    digest = data.pop("digest")
    path.write_text(json.dumps(data | {"digest": b.seal(data) if seal else digest}))


def first_version(path):
    """Rewrite a record as version 1 had it: without what the builder said of the engine's memory."""
    data = json.loads(path.read_text())
    for key in ("digest", "activation_bytes", "allocates_when_run"):
        del data[key]
    data["version"] = 1
    path.write_text(json.dumps(data | {"digest": b.seal(data)}))


def test_a_record_of_version_1_is_read(bundle):
    built = put(bundle, make_key(bundle))
    path = bundle.root / "engines" / "backbone-tensorrt-rtx-sm89.json"
    first_version(path)
    found = find_engine(bundle, "backbone", HOST)
    assert found == store.BuiltEngine(
        built.path, dataclasses.replace(built.record, activation_bytes=None, allocates_when_run=False)
    )
    # It has no keys of version 2.
    edit_record(path, True, activation_bytes=None)
    with pytest.raises(EngineError, match="unknown keys"):
        read_record(path)


def test_edited_records(bundle):
    put(bundle, make_key(bundle))
    path = bundle.root / "engines" / "backbone-tensorrt-rtx-sm89.json"
    edit_record(path, False, bytes=3)
    with pytest.raises(EngineError, match="does not match its own digest; it was edited, build the engine again"):
        read_record(path)
    for file in ("../manifest.json", "/etc/passwd", "..", ""):
        edit_record(path, True, file=file)
        with pytest.raises(EngineError, match="must lie beside its record"):
            read_record(path)
    edit_record(path, True, file="x.engine", pickle=1)
    with pytest.raises(EngineError, match="unknown keys"):
        read_record(path)


def test_a_failed_build_leaves_the_engine_before_it(bundle):
    key = make_key(bundle)
    put(bundle, key)

    def fail(error):
        def build(out):
            out.write(b"half")
            raise error

        return build

    for error in (KeyboardInterrupt(), EngineError("no"), SystemExit(143)):
        with pytest.raises(type(error)), locked_store(bundle):
            write_engine(bundle, make_key(bundle, platform="other"), fail(error))
        assert len(engines(bundle)) == 2
        assert find_engine(bundle, "backbone", HOST).record.key == key
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EngineError, match="is full; the unfinished engine was removed"), locked_store(bundle):
        write_engine(bundle, key, fail(full))
    assert len(engines(bundle)) == 2


def test_a_failed_first_build_leaves_nothing(bundle):
    def build(out):
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"), locked_store(bundle):
        write_engine(bundle, make_key(bundle), build)
    assert not (bundle.root / "engines").exists()


def test_what_a_killed_build_left_is_cleared(bundle):
    put(bundle, make_key(bundle))
    for name in ("backbone-tensorrt-rtx-sm120.partial", "backbone-tensorrt-rtx-sm120-0123.engine"):
        (bundle.root / "engines" / name).write_bytes(b"half")
    with locked_store(bundle):
        pass
    assert len(engines(bundle)) == 2


def test_two_builds_exclude_each_other(bundle):
    with (
        locked_store(bundle),
        pytest.raises(EngineError, match="another build is writing engines"),
        locked_store(bundle),
    ):
        pass
    assert engines(bundle) == []


def test_a_bundle_that_cannot_be_written(bundle):
    (bundle.root / "engines").write_text("a file")
    with pytest.raises(
        EngineError, match=r"engines cannot be written: .*; engines are stored in the bundle's folder, "
    ):
        put(bundle, make_key(bundle))


def test_the_manifest_lists_no_engines(bundle):
    entry = {"bytes": 0, "sha256": "0" * 64}
    edit_manifest(bundle.root, **{"files__engines/x.engine": entry})
    with pytest.raises(
        BundleError, match=r"file 'engines/x.engine' must not be in engines/, which is for built engines"
    ):
        Bundle.open(bundle.root)


class Driver:
    """CUDA's driver with one H200; `failing` is the function that reports an error."""

    def __init__(self, failing=None):
        self.failing = failing

    def __getattr__(self, name):
        return lambda *arguments: 100 if name == self.failing else getattr(self, f"_{name}")(*arguments)

    def _cuInit(self, flags):
        return 0

    def _cuDeviceGet(self, device, index):
        return 0

    def _cuDeviceGetName(self, name, size, device):
        name.value = b"NVIDIA H200"
        return 0

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0


def test_the_gpu_here(monkeypatch):
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver())
    assert find_gpu() == Gpu("NVIDIA H200", "sm90")
    for failing in ("cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"):
        monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name, failing=failing: Driver(failing))
        assert find_gpu() is None


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(gpu.ctypes, "CDLL", missing)
    assert find_gpu() is None


def test_this_host(monkeypatch):
    class Module:
        __version__ = "1.7.9"

    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    monkeypatch.setattr(store, "find_gpu", lambda: Gpu("NVIDIA GeForce RTX 4090", "sm89"))
    monkeypatch.setattr(store, "this_platform", lambda: "linux-x86_64")
    assert this_host("tensorrt-rtx") == Host("tensorrt-rtx", "1.7.9", "sm89", None, "linux-x86_64")
    monkeypatch.setattr(store, "find_gpu", lambda: None)
    with pytest.raises(
        EngineError, match=r"^tensorrt-rtx engines run on an NVIDIA GPU, and the CUDA driver finds none"
    ):
        this_host("tensorrt-rtx")
    with pytest.raises(EngineError, match=r"^tensorrt must be version 11, got 1.7.9; run: pip install"):
        this_host("tensorrt")
