"""Directories and hub ids: what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from arcflow_export.errors import SourceError
from arcflow_export.load import load_student
from arcflow_export.sources import Location, read_json, resolve


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that answers with an empty snapshot and records the call; `raises` makes it fail."""
    record = SimpleNamespace(calls=[], snapshot=tmp_path / "c0ffee", raises=None)
    record.snapshot.mkdir()

    def snapshot_download(name, **options):
        record.calls.append((name, options))
        if record.raises:
            raise record.raises
        return str(record.snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return record


def fails(message, *arguments, **options):
    with pytest.raises(SourceError) as error:
        resolve(Location(*arguments, **options), "adapter")
    assert str(error.value) == message


def http_error(kind):
    response = SimpleNamespace(headers={}, status_code=404, request=None)
    return kind("404 Client Error", response=response)


def test_directory(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    found = resolve(Location(str(tmp_path / "a")), "adapter")
    assert (found.name, found.path, found.revision) == ("a", tmp_path / "a", None)
    assert resolve(Location(str(tmp_path / "a"), "sub"), "adapter").path == tmp_path / "a" / "sub"
    fails(f"adapter: {tmp_path / 'a'} has no subfolder 'bus'", str(tmp_path / "a"), "bus")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "owner/na me", "a/b/c", "loras/missing.safetensors", "-a/b"])
def test_names_that_are_no_hub_ids(hub, name):
    fails(
        f"adapter: {name!r} is no file or directory here, nor a hub id of the form 'owner/name'; check the spelling",
        name,
    )
    assert hub.calls == []


def test_empty_name():
    fails("adapter: the name is empty; give a directory or a hub id of the form 'owner/name'", "")


def test_hub_with_subfolder_and_revision(hub):
    (hub.snapshot / "two").mkdir()
    found = resolve(Location("owner/name", "two", "v1"), "adapter")
    assert (found.name, found.path, found.revision) == ("owner/name/two", hub.snapshot / "two", "c0ffee")
    [(name, options)] = hub.calls
    assert name == "owner/name"
    assert options == {
        "revision": "v1",
        "allow_patterns": ["two/*.safetensors", "two/*.json", "two/*.txt", "two/*.model"],
        "ignore_patterns": None,
        "local_files_only": False,
    }


def test_subfolder_that_the_hub_does_not_have(hub):
    fails("adapter: owner/name on the hub has no subfolder 'tow'", "owner/name", "tow")


REPOSITORY = [
    "README.md",
    "ae.safetensors",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.bin",
]


def downloaded(options):
    patterns = {k: options[k] for k in ("allow_patterns", "ignore_patterns")}
    return list(filter_repo_objects(REPOSITORY, **patterns))


def test_base_is_fetched_without_pickles_and_without_the_authors_own_files(hub):
    """FLUX.1-dev's root holds the model a second time, 24 GB of it."""
    with pytest.raises(SourceError, match=r"has no model_index\.json"):
        load_student(Location("owner/flux", offline=True), Location("owner/adapter"), [])
    [(_, options)] = hub.calls
    assert options["local_files_only"] is True
    assert downloaded(options) == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ]


def test_adapter_at_the_root_is_fetched_without_subfolders(hub):
    resolve(Location("owner/name"), "adapter")
    [(_, options)] = hub.calls
    assert downloaded(options) == ["ae.safetensors", "flux1-dev.safetensors", "model_index.json"]


def test_gated(hub):
    hub.raises = http_error(huggingface_hub.errors.GatedRepoError)
    fails("adapter: owner/name is gated; accept its licence on the hub and log in with `hf auth login`", "owner/name")


def test_no_such_revision(hub):
    hub.raises = http_error(huggingface_hub.errors.RevisionNotFoundError)
    fails("adapter: owner/name has no revision 'v9'", "owner/name", revision="v9")


def test_no_such_repository(hub):
    hub.raises = http_error(huggingface_hub.errors.RepositoryNotFoundError)
    fails(
        "adapter: 'owner/name' is neither a directory here nor a repository on the hub; "
        "check the spelling, or log in with `hf auth login` if it is private",
        "owner/name",
    )


def test_hub_that_cannot_be_reached(hub):
    hub.raises = ConnectionError("Name or service not known\nmore")
    fails(
        "adapter: 'owner/name' is no directory here and the hub could not be reached (Name or service not known); "
        "check the path or the network",
        "owner/name",
    )


def test_offline_and_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    fails(
        "adapter: 'no-such-owner/name' is no directory here and not in the hub's cache at revision 'v1'; "
        "check the spelling, or leave out --offline to fetch it",
        "no-such-owner/name",
        revision="v1",
        offline=True,
    )


def test_real_client_without_a_network_gives_up_soon(tmp_path, monkeypatch):
    """The client's own retries must not keep a user waiting for minutes; port 9 refuses at once."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"^adapter: 'owner/name' is no directory here and the hub could not be"):
        resolve(Location("owner/name"), "adapter")
    assert time.monotonic() - started < 30


def test_json(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (
        ("[]", "must hold a JSON object, got list"),
        ("{,}", "is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    ):
        path.write_text(text)
        with pytest.raises(SourceError) as error:
            read_json(path, "vae")
        assert str(error.value) == f"vae: {path} {message}"
    path.unlink()
    with pytest.raises(SourceError) as error:
        read_json(path, "vae")
    assert str(error.value) == f"vae: {path} is missing"
