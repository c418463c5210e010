"""huggingface_hub's own client against a stand-in for the hub: what is fetched, resumed, kept and said."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants, file_download, snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled

from arcflow_export.checkpoint.layout import adapter_files, base_files
from arcflow_export.checkpoint.sources import Location, measure, resolve
from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.errors import SourceError
from arcflow_export.student.load import load_student
from arcflow_runtime import cli
from tests.hub import ARCFLOW, DECOYS, FLUX, QWEN, SUBFOLDERS, Hub, release

ADAPTER = Location(ARCFLOW, SUBFOLDERS["flux"])
SHARD = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
BIG = f"{SUBFOLDERS['flux']}/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return release(tmp_path_factory.mktemp("released"))


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    """A hub of its own cache, whose client does not wait between retries and keeps small pieces."""
    with Hub(released) as hub:
        hub.cache = hub.connect(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        yield hub


def fetch(location=ADAPTER, choose=adapter_files, what="adapter", **options):
    return resolve(location, what, choose, **options)


def refused(location=ADAPTER, choose=adapter_files, what="adapter", find=resolve):
    with pytest.raises(SourceError) as error:
        find(location, what, choose)
    return str(error.value)


def wanted(hub, repository):
    return [f"{repository}/{name}" for name in hub.files(repository) if name not in DECOYS[repository]]


def blob(hub, repository, name):
    """Where the cache keeps a file's contents."""
    folder = hub.cache / f"models--{repository.replace('/', '--')}"
    return folder / "blobs" / hub.digest(hub.folder / repository / name)[1]


@pytest.mark.parametrize(("family", "repository"), [("flux", FLUX), ("qwen", QWEN)])
def test_exactly_what_the_stages_need_is_fetched_once(hub, monkeypatch, family, repository):
    adapter = Location(ARCFLOW, SUBFOLDERS[family])
    student = load_student(Location(repository), adapter, [])
    theirs = [f"{ARCFLOW}/{SUBFOLDERS[family]}/{n}" for n in ("config.json", "diffusion_pytorch_model.safetensors")]
    assert hub.downloads == sorted([*wanted(hub, repository), *theirs])
    assert (student.base.name, student.base.revision) == (repository, hub.commit(repository))
    assert student.adapter.source.name == f"{ARCFLOW}/{SUBFOLDERS[family]}"
    assert student.adapter.source.revision == hub.commit(ARCFLOW)
    for name in wanted(hub, repository):
        relative = name.removeprefix(f"{repository}/")
        assert (student.base.path / relative).read_bytes() == (hub.folder / name).read_bytes()

    hub.requests.clear()
    again = load_student(Location(repository), adapter, [])
    assert again.sources == student.sources
    assert {r.path for r in hub.requests} == {f"/api/models/{repository}", f"/api/models/{ARCFLOW}"}

    hub.requests.clear()
    offline = load_student(Location(repository, offline=True), Location(ARCFLOW, SUBFOLDERS[family], offline=True), [])
    assert offline.sources == student.sources
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_student(Location(repository), adapter, []).sources == student.sources
    assert hub.requests == []


def test_what_is_fetched_is_a_whole_pipeline_for_diffusers(hub):
    """Calibration and the comparison with torch load it with `from_pretrained`."""
    from diffusers import FluxPipeline

    found = fetch(Location(FLUX), base_files, "base checkpoint")
    hub.requests.clear()
    pipe = FluxPipeline.from_pretrained(found.path, use_safetensors=True)
    assert pipe.scheduler.config.num_train_timesteps == 1000
    assert hub.requests == []


def test_a_mistake_with_the_adapter_is_found_before_the_base_is_fetched(hub):
    with pytest.raises(SourceError) as error:
        load_student(Location(FLUX), Location(ARCFLOW, "arcflow-flux-4steps"), [])
    assert str(error.value) == f"adapter: {ARCFLOW} on the hub has no subfolder 'arcflow-flux-4steps'"
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]


def test_sizes_are_known_before_anything_is_fetched(hub):
    base = Location(FLUX)
    before = measure(base, "base checkpoint", base_files)
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]
    assert sorted(f"{FLUX}/{f.name}" for f in before.files) == wanted(hub, FLUX)
    assert before.bytes == sum((hub.folder / name).stat().st_size for name in wanted(hub, FLUX))
    assert before.revision == hub.commit(FLUX)
    assert before.cached_bytes == sum(f.bytes for f in before.files if f.name.endswith("index.json"))
    resolve(base, "base checkpoint", base_files)
    after = measure(base, "base checkpoint", base_files)
    assert after.cached_bytes == after.bytes == before.bytes


def test_configs_without_weights(hub):
    found = fetch(Location(FLUX), base_files, "base checkpoint", weights=False)
    assert hub.downloads == [name for name in wanted(hub, FLUX) if not name.endswith(".safetensors")]
    assert (found.path / "transformer" / "config.json").is_file()
    assert not (found.path / SHARD).exists()
    fetch(Location(FLUX), base_files, "base checkpoint")
    assert hub.downloads == wanted(hub, FLUX)


def test_revision(hub):
    commit = hub.commit(ARCFLOW)
    assert fetch(Location(ARCFLOW, SUBFOLDERS["flux"], commit)).revision == commit
    hub.requests.clear()
    assert fetch(Location(ARCFLOW, SUBFOLDERS["flux"], commit)).revision == commit
    assert hub.requests == [], "a commit does not change"
    assert refused(Location(ARCFLOW, SUBFOLDERS["flux"], "v9")) == f"adapter: {ARCFLOW} has no revision 'v9'"


def test_no_such_repository(hub):
    assert refused(Location("ymyy307/ArcFlaw")) == (
        "adapter: 'ymyy307/ArcFlaw' is neither a directory here nor a repository on the hub; "
        "check the spelling, or log in with `hf auth login` if it is private"
    )


def test_adapter_without_its_subfolder(hub):
    assert refused(Location(ARCFLOW)) == (
        f"adapter: {ARCFLOW} has no config.json; give --adapter-subfolder, one of "
        "arcflow-flux-2steps, arcflow-qwen-2steps"
    )


def test_gated(hub, monkeypatch):
    """A gated repository is listed for everybody; its files are not sent. The login goes to the hub alone."""
    hub.gate(FLUX, token="hf_mine")
    base, message = Location(FLUX), f"{FLUX} is gated; accept its licence on the hub and log in with `hf auth login`"
    for find in (measure, resolve):
        assert refused(base, base_files, "base checkpoint", find) == f"base checkpoint: {message}"
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert refused(base, base_files, "base checkpoint") == f"base checkpoint: {message}"
    assert {r.status for r in hub.requests} >= {401, 403}
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    fetch(base, base_files, "base checkpoint")
    assert hub.downloads.count(f"{FLUX}/{SHARD}") == 1


def test_offline_and_never_fetched(hub, monkeypatch):
    location = Location(ARCFLOW, SUBFOLDERS["flux"], offline=True)
    head = f"adapter: {ARCFLOW!r} is not a directory here and not in the hub's cache"
    assert refused(location) == f"{head}; check the spelling, or leave out --offline to download it"
    assert refused(Location(ARCFLOW, None, "v1", True)) == (
        f"{head} at revision 'v1'; check the spelling, or leave out --offline to download it"
    )
    commit = "0" * 40
    assert f"at revision '{commit}'" in refused(Location(ARCFLOW, None, commit, True))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused() == f"{head}; check the spelling, or unset HF_HUB_OFFLINE to download it"
    assert hub.requests == []


def test_offline_with_a_cache_that_has_a_part(hub, monkeypatch):
    found = fetch(Location(FLUX), base_files, "base checkpoint")
    for name in (SHARD, "scheduler/scheduler_config.json", "tokenizer/merges.txt", "vae/config.json"):
        (found.path / name).unlink()
    message = (
        f"base checkpoint: the hub's cache has only a part of {FLUX}: scheduler/scheduler_config.json, "
        f"tokenizer/merges.txt, {SHARD} and 1 more missing in {found.path}; {{}} to download the rest"
    )
    location = Location(FLUX, offline=True)
    assert refused(location, base_files, "base checkpoint") == message.format("leave out --offline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(Location(FLUX), base_files, "base checkpoint") == message.format("unset HF_HUB_OFFLINE")


def test_link_to_a_missing_file_is_fetched_again(hub):
    """A cache that was cleaned by hand: the link is there, its contents are not."""
    found = fetch()
    blob(hub, ARCFLOW, BIG).unlink()
    assert os.path.islink(hub.cache / found.path / "diffusion_pytorch_model.safetensors")
    message = refused(Location(ARCFLOW, SUBFOLDERS["flux"], offline=True))
    assert message.startswith(f"adapter: the hub's cache has only a part of {ARCFLOW}: {BIG} missing in ")
    hub.requests.clear()
    again = fetch()
    assert hub.downloads == [f"{ARCFLOW}/{BIG}"]
    assert (again.path / "diffusion_pytorch_model.safetensors").is_file()


def test_cache_of_a_client_that_kept_no_listing(hub, monkeypatch):
    """As older clients leave it; a commit's files are then those whose links are there."""
    found = fetch()
    for listing in (hub.cache / f"models--{ARCFLOW.replace('/', '--')}" / "trees").iterdir():
        listing.unlink()
    moved = hub.cache.rename(hub.cache.with_name("moved"))  # the client also keeps listings in memory, by path
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(moved))
    hub.requests.clear()
    again = fetch(Location(ARCFLOW, SUBFOLDERS["flux"], offline=True))
    assert again.revision == found.revision
    assert hub.requests == []


def test_a_transfer_that_breaks_off_goes_on_in_the_next_run(hub):
    whole = (hub.folder / ARCFLOW / BIG).read_bytes()
    cut = len(whole) // 2
    hub.cut(f"{ARCFLOW}/{BIG}", cut)
    assert re.fullmatch(
        rf"adapter: the download of {ARCFLOW} was interrupted \(peer closed connection [^\n]*\); "
        "run the same command again to continue it",
        refused(),
    )
    contents = blob(hub, ARCFLOW, BIG)
    partial = contents.with_name(f"{contents.name}.incomplete")
    kept = partial.stat().st_size
    assert cut - 4096 < kept <= cut, "whole pieces are kept"
    hub.mend()
    hub.requests.clear()
    found = fetch()
    assert [r.start for r in hub.requests if r.path.startswith("/lfs/")] == [kept]
    assert (found.path / "diffusion_pytorch_model.safetensors").read_bytes() == whole
    assert not partial.exists()


def test_a_connection_that_is_lost_for_a_moment_is_not_noticed(hub, monkeypatch):
    hub.cut(f"{ARCFLOW}/{BIG}", 100_000)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: hub.mend()))
    fetch()
    first, second = [r.start for r in hub.requests if r.path.startswith("/lfs/")]
    assert first == 0 and 100_000 - 4096 < second <= 100_000


def test_other_transfers_stop_when_one_fails(hub, monkeypatch):
    """Ctrl-C and a broken transfer must not wait for hours until other files are whole."""
    stopped = []
    started = threading.Barrier(3)

    def get(url, file, *, tqdm_class, **_):
        started.wait(60)
        if "00001" in url:
            raise ConnectionError("cable pulled")
        with tqdm_class(total=1) as bar:
            try:
                for _ in range(5000):
                    bar.update(0)
                    time.sleep(0.001)
            except InterruptedError:
                stopped.append(url)
                raise

    monkeypatch.setattr(file_download, "http_get", get)
    shards = [f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert refused(Location(FLUX), lambda _: shards) == (
        f"adapter: the download of {FLUX} was interrupted (cable pulled); run the same command again to continue it"
    )
    assert len(stopped) == 2


def test_what_an_interrupted_run_left_is_checked(hub):
    """Of a file that was put together from two runs the hash is compared; a part too long is thrown away."""
    size = (hub.folder / ARCFLOW / BIG).stat().st_size
    contents = blob(hub, ARCFLOW, BIG)
    contents.parent.mkdir(parents=True)
    partial = contents.with_name(f"{contents.name}.incomplete")
    partial.write_bytes(b"x" * 1000)
    assert refused() == (
        f"adapter: {BIG} of {ARCFLOW} was damaged by an interrupted download; "
        "run the same command again to download it from the start"
    )
    assert not partial.exists()
    partial.write_bytes(b"x" * (size + 1))
    found = fetch()
    assert (found.path / "diffusion_pytorch_model.safetensors").stat().st_size == size


def test_full_disk(hub, monkeypatch):
    def full(url, file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        assert refused() == (
            f"adapter: the disk of {hub.cache} is full; free some space and run the same command again, "
            "or set HF_HOME to a folder on a larger disk"
        )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 0))
    hub.requests.clear()
    assert refused() == (
        f"adapter: {ARCFLOW} needs 0.0 GB more in the hub's cache, {hub.cache} has 0.0 GB free; "
        "free some space, or set HF_HOME to a folder on a larger disk"
    )
    assert hub.downloads == []


def test_hub_that_is_gone(hub):
    """The cache answers for it; without, one sentence."""
    found = fetch()
    hub.stop()
    close_session()
    assert fetch() == found
    assert refused(Location(FLUX)).startswith(
        f"adapter: {FLUX!r} is not a directory here and the hub cannot be reached ([Errno 111] Connection refused"
    )


def test_the_stand_in_answers_the_client_as_the_hub_does(hub):
    """Every file of a repository, by the client alone."""
    found = snapshot_download(QWEN)
    for name in hub.files(QWEN):
        with open(f"{found}/{name}", "rb") as f:
            assert f.read() == (hub.folder / QWEN / name).read_bytes()


def test_bars_of_downloads_are_shown(monkeypatch):
    """transformers switches them off together with its own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    quiet_libraries()
    assert not are_progress_bars_disabled()


def test_the_command_shows_no_traceback(hub, tmp_path, capsys):
    hub.gate(FLUX)
    arguments = ["--base", FLUX, "--adapter", ARCFLOW, "--adapter-subfolder", SUBFOLDERS["flux"]]
    assert cli.main(["export", *arguments, "--out", str(tmp_path / "bundle")]) == 1
    assert capsys.readouterr().err == (
        f"arcflow export: error: base checkpoint: {FLUX} is gated; "
        "accept its licence on the hub and log in with `hf auth login`\n"
    )
    assert not (tmp_path / "bundle").exists()
