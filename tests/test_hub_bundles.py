"""Bundles on a stand-in for the hub, with the real client: pushed, found again, resumed, and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_bundle import edit_manifest, list_files, make_bundle
from huggingface_hub import ModelCard, close_session, constants, file_download, scan_cache_dir

from arcflow_runtime import Bundle, BundleError, Pipeline, RequestError, SourceError, backends, cli
from arcflow_runtime.hub.bundles import find_bundle
from arcflow_runtime.hub.push import push_bundle
from arcflow_serve.models import open_models
from arcflow_serve.settings import Settings
from tests.hub import Hub

ID = "ann/shapes"
SIZE = {"height": 32, "width": 32}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, and a client that is logged in and may write."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("writer")
    with Hub(tmp_path / "hub") as hub:
        hub.cache = hub.connect(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.setitem(backends.BACKENDS, "fake", "fake_bundle")
        yield hub


@pytest.fixture
def bundle(tmp_path):
    root = make_bundle(tmp_path / "made")
    edit_manifest(root, provenance__base__name="FLUX.1-dev")
    return root


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def refused(call, *arguments, error=SourceError, **options):
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def weigh(bundle, name, size):
    """Make a weights file large enough to be cut, and seal the manifest again."""
    (bundle / name).write_bytes(bytes(range(256)) * (size // 256))
    files = {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in list_files(bundle).items()}
    edit_manifest(bundle, files=files)


def test_what_is_pushed_is_loaded_again_bit_for_bit(hub, bundle):
    (bundle / "engines").mkdir()
    (bundle / "engines" / "backbone.engine").write_bytes(b"built here")
    pushed = push_bundle(bundle, ID, private=True)
    files = [*Bundle.open(bundle).manifest.files, "manifest.json"]
    assert hub.files(ID) == sorted([*files, ".gitattributes", "README.md"])
    assert (hub.visibility[ID], hub.commits, pushed.commit) == ("private", 1, hub.commit(ID))

    found = find_bundle(ID)
    assert (found.name, found.commit) == ("shapes", pushed.commit)
    assert contents(found.path) == {n: data for n, data in contents(bundle).items() if not n.startswith("engines/")}
    assert not [p for p in found.path.rglob("*") if p.is_symlink()]
    assert Bundle.open(found.path, "full").manifest == Bundle.open(bundle).manifest
    with Pipeline.load(ID, "fake") as there, Pipeline.load(bundle, "fake") as here:
        assert there("a fox", seed=3, **SIZE).images[0].tobytes() == here("a fox", seed=3, **SIZE).images[0].tobytes()

    hub.requests.clear()
    assert find_bundle(f"{ID}@{pushed.commit}") == found
    assert not [r for r in hub.requests if r.method == "GET" and "resolve" in r.path]
    hub.stop()
    close_session()
    assert find_bundle(ID) == find_bundle(ID, offline=True) == found, "the commit that the cache knew last"


def test_the_download_takes_no_space_beside_the_cache(hub, bundle):
    push_bundle(bundle, ID)
    found = find_bundle(ID)
    blobs = {p.stat().st_ino for p in (hub.cache / "models--ann--shapes" / "blobs").iterdir()}
    assert {p.stat().st_ino for p in found.path.rglob("*") if p.is_file()} <= blobs
    scanned = scan_cache_dir(hub.cache)
    assert [r.repo_id for r in scanned.repos] == [ID] and not scanned.warnings
    scanned.delete_revisions(found.commit).execute()
    assert not found.path.exists(), "`hf cache rm` removes it too"


def test_revisions(hub, bundle):
    main = push_bundle(bundle, ID)
    edit_manifest(bundle, provenance__created="2026-02-02T00:00:00Z")
    branch = push_bundle(bundle, ID, branch="next")
    assert main.commit != branch.commit
    for revision, pushed in ((None, main), ("next", branch), (main.commit, main), (branch.commit, branch)):
        assert find_bundle(ID, revision).commit == pushed.commit
    assert find_bundle(f"{ID}@next") == find_bundle(ID, "next")
    with Pipeline.load(ID, "fake", revision="next") as pipeline:
        assert pipeline.bundle.manifest.provenance.created == "2026-02-02T00:00:00Z"
    assert refused(find_bundle, ID, "gone") == f"bundle: {ID} has no revision 'gone'"
    assert refused(find_bundle, f"{ID}@next", "main") == (
        f"bundle: {ID}@next names a revision, and 'main' is given too; give one of them"
    )


def test_the_service_takes_an_id(hub, bundle):
    push_bundle(bundle, ID)
    edit_manifest(bundle, schedule__num_inference_steps=4)
    push_bundle(bundle, ID, branch="next")
    models = open_models([Path(f"{ID}@next")], Settings(backend="fake", threads=1))
    assert list(models) == ["shapes"] and models["shapes"].loaded
    assert models["shapes"].manifest.schedule.num_inference_steps == 4
    models["shapes"].close()
    with pytest.raises(RequestError, match="bundles must have different names, got 'shapes' twice"):
        open_models([Path(ID), Path(f"{ID}@next")], Settings(backend="fake", threads=1))


def test_a_path_that_exists_wins_over_an_id(hub, bundle, tmp_path, monkeypatch):
    push_bundle(bundle, ID)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann").mkdir()
    bundle.rename(tmp_path / ID)
    hub.requests.clear()
    assert find_bundle(ID).commit is None
    with Pipeline.load(ID, "fake") as pipeline:
        assert pipeline.bundle.root == tmp_path / ID
    assert hub.requests == []
    assert refused(find_bundle, ID, "main") == (
        f"bundle: {ID} is a directory here, so it has no revision 'main'; leave that out"
    )
    assert refused(find_bundle, "nowhere", "main") == (
        "bundle: nowhere is not a hub id of the form 'owner/name', so it has no revision 'main'; leave that out"
    )


def test_an_interrupted_download_goes_on(hub, bundle):
    weigh(bundle, "backbone.safetensors", 1 << 20)
    push_bundle(bundle, ID)
    hub.cut(f"{ID}/backbone.safetensors", 1 << 19)
    assert re.fullmatch(
        rf"bundle: the download of {ID} was interrupted \(peer closed connection [^\n]*\); "
        "run the same command again to continue it",
        refused(find_bundle, ID),
    )
    hub.mend()
    hub.requests.clear()
    found = find_bundle(ID)
    (start,) = [r.start for r in hub.requests if r.path.endswith("backbone.safetensors") and "/lfs/" in r.path]
    assert (1 << 19) - 4096 < start <= 1 << 19
    assert contents(found.path) == contents(bundle)


def test_an_interrupted_push_goes_on(hub, bundle):
    weights = Bundle.open(bundle).manifest.files["backbone.safetensors"]
    hub.refused_uploads.add(weights.sha256)
    assert re.fullmatch(
        rf"{ID}: the upload was interrupted \([^\n]+\); run the same command again to continue it",
        refused(push_bundle, bundle, ID),
    )
    assert hub.commits == 0, "half a bundle is never seen"
    hub.refused_uploads.clear()
    sent = set(hub.objects)
    hub.requests.clear()
    push_bundle(bundle, ID)
    again = {r.path.rpartition("/")[2] for r in hub.requests if r.path.startswith("/upload/")}
    assert weights.sha256 in again and not again & sent


def test_a_damaged_bundle_is_not_pushed(hub, bundle):
    whole = (bundle / "backbone.safetensors").read_bytes()
    (bundle / "backbone.safetensors").write_bytes(whole[::-1])
    assert refused(push_bundle, bundle, ID, error=BundleError) == (
        f"{bundle}/backbone.safetensors does not match its SHA-256 in manifest.json; "
        "it was edited or damaged, export or copy it again"
    )
    assert hub.requests == []


def test_a_wrong_hash_is_refused_and_the_file_forgotten(hub, bundle):
    push_bundle(bundle, ID)
    file = hub.folder / ID / "backbone.safetensors"
    right = file.read_bytes()
    file.write_bytes(right[::-1])
    hub.forget(file)
    said = (
        f"bundle: backbone.safetensors of {ID} does not match its SHA-256 in the manifest and was removed from the "
        "cache; run the same command again, and if that fails too, the bundle on the hub is damaged: push it again"
    )
    assert refused(find_bundle, ID) == said
    assert refused(Pipeline.load, ID, "fake") == said, "nothing of it is used the second time either"
    file.write_bytes(right)
    hub.forget(file)
    assert contents(find_bundle(ID).path) == contents(bundle)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "manifest.json").unlink(), "has no manifest.json, so it is not a bundle; push one with"),
        (lambda root: (root / "backbone.onnx").unlink(), "lacks backbone.onnx, which its manifest lists; push"),
        (lambda root: (root / "backbone.onnx").write_text("cut"), "backbone.onnx must have 17 bytes, got 3; push"),
    ],
)
def test_a_repository_that_is_no_whole_bundle(hub, bundle, damage, message):
    push_bundle(bundle, ID)
    damage(hub.folder / ID)
    hub._digests.clear()
    assert message in refused(find_bundle, ID)
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]


def test_names_that_leave_the_bundle_are_refused_before_the_download(hub, bundle):
    push_bundle(bundle, ID)
    root = hub.folder / ID
    edit_manifest(root, **{"files__../../token": {"bytes": 6, "sha256": "0" * 64}})
    hub._digests.clear()
    assert "file name '../../token' leaves the bundle" in refused(find_bundle, ID, error=BundleError)
    assert [name for name in hub.downloads if "manifest" not in name] == []


def test_pushing_again_deletes_the_files_of_the_earlier_bundle_alone(hub, bundle, tmp_path):
    push_bundle(bundle, ID)
    (hub.folder / ID / "LICENSE.md").write_text("mine")
    other = make_bundle(tmp_path / "other", "qwen-image")
    edit_manifest(other, provenance__base__name="Qwen/Qwen-Image")
    push_bundle(other, ID)
    assert contents(find_bundle(ID).path) == contents(other)
    files = [*Bundle.open(other).manifest.files, "manifest.json"]
    assert hub.files(ID) == sorted([*files, ".gitattributes", "README.md", "LICENSE.md"])


def test_another_model_is_not_overwritten(hub, bundle):
    (hub.folder / ID).mkdir(parents=True)
    (hub.folder / ID / "model.safetensors").write_bytes(b"somebody's")
    assert refused(push_bundle, bundle, ID) == (
        f"{ID} must be empty or hold a bundle, but it has model.safetensors and no manifest of a bundle; "
        "push to another name"
    )
    assert hub.files(ID) == ["model.safetensors"]


def test_without_a_login(hub, bundle, tmp_path):
    (tmp_path / "home" / "token").write_text("reader")
    assert refused(push_bundle, bundle, ID) == (
        f"{ID}: the hub refuses to write there (status 401); log in with `hf auth login` and a token that may write "
        "there"
    )
    assert refused(push_bundle, bundle, "not an id", error=RequestError) == (
        "the repository must be a hub id of the form 'owner/name', got 'not an id'"
    )


def test_the_model_card_has_the_facts_and_the_licence(hub, bundle):
    edit_manifest(bundle, provenance__loras=[{"name": "a|b/ink", "revision": None, "sha256": "0" * 64, "scale": 0.8}])
    push_bundle(bundle, ID)
    text = (hub.folder / ID / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.license_name) == ("other", "flux-1-dev-non-commercial-license")
    assert data.license_link == f"{hub.endpoint}/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert (data.base_model, data.pipeline_tag, data.library_name) == (
        "black-forest-labs/FLUX.1-dev",
        "text-to-image",
        "arcflow",
    )
    assert "may be used for non-commercial purposes only" in text
    assert f"Pipeline.load('{ID}')" in text
    for line in (
        "| backbone | 7 | float32 | 0.0 |",
        "| LoRAs merged in | a\\|b/ink, scale 0.8 |",
        "| image size | 16 to 256 by 16 to 128 px |",
        "| format | bundle version 1 |",
    ):
        assert line in text.splitlines()


def test_the_licence_of_an_unknown_base_must_be_given(hub, bundle):
    edit_manifest(bundle, provenance__base__name="my-teacher")
    assert refused(push_bundle, bundle, ID, error=RequestError) == (
        "--license must be given, because the licence of the base 'my-teacher' is not known here; "
        "give an id such as --license apache-2.0"
    )
    assert hub.requests == []
    push_bundle(bundle, ID, licence="mit")
    assert ModelCard((hub.folder / ID / "README.md").read_text()).data.license == "mit"
    edit_manifest(bundle, provenance__base__name="black-forest-labs/FLUX.1-dev")
    assert refused(push_bundle, bundle, ID, licence="mit", error=RequestError) == (
        "--license must be 'flux-1-dev-non-commercial-license', that of the base black-forest-labs/FLUX.1-dev, "
        "got 'mit'"
    )


def test_the_commands(hub, bundle, tmp_path, capsys):
    assert cli.main(["push", str(bundle), ID, "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert pushed == {"repo_id": ID, "commit": hub.commit(ID), "files": 13, "bytes": pushed["bytes"]}
    out = tmp_path / "fox.png"
    assert cli.main(["generate", f"{ID}@{pushed['commit']}", "a fox", "--backend", "fake", "--out", str(out)]) == 0
    assert out.is_file()
    capsys.readouterr()
    assert cli.main(["inspect", ID, "--check"]) == 0
    assert "every file matches its SHA-256" in capsys.readouterr().out


def test_without_the_client(monkeypatch):
    monkeypatch.setattr("arcflow_runtime.hub.bundles.find_spec", lambda name: None)
    said = refused(find_bundle, "ann/nothing-here")
    assert re.fullmatch(
        r"bundle: 'ann/nothing-here' is not a directory here, and a bundle on the hub needs the hub's client; "
        r"run: pip install (-e )?'.*\[hub\]'",
        said,
    )
