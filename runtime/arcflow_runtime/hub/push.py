"""Push a bundle to the hub: a directory whose hashes are right -> one commit with its files and a model card.

The client skips files that the hub already has, so an interrupted push continues with the file it was at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcflow_runtime.disk.bundle import read_manifest
from arcflow_runtime.disk.checked import open_checked
from arcflow_runtime.disk.manifest import MANIFEST
from arcflow_runtime.errors import BundleError, RequestError, SourceError
from arcflow_runtime.hub.bundles import is_hub_id, need_client

_CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """A finished push: repository, commit, number of files and their bytes."""

    repo_id: str
    commit: str
    files: int
    bytes: int


def push_bundle(
    root: Path,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Upload a bundle, without its built engines and tokenizers, as one commit.

    Files of an earlier bundle that the new one does not have are deleted, and README.md is replaced.

    Args:
        root: the bundle's directory.
        repo_id: `owner/name`; the repository is created if it does not exist.
        private: create the repository private; one that exists keeps its visibility.
        branch: branch to push to, created if it does not exist; None is the default branch.
        licence: as for `card.model_card`.

    Raises:
        BundleError: the bundle is damaged; every file is compared with its SHA-256 first.
        RequestError: `repo_id` is not an id, or the licence is missing or wrong.
        SourceError: the hub refuses or cannot be reached, or the repository holds something other than a bundle.
    """
    if not is_hub_id(repo_id):
        raise RequestError(f"the repository must be a hub id of the form 'owner/name', got {repo_id!r}")
    need_client("arcflow push needs the hub's client")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    from arcflow_runtime.hub.card import model_card

    bundle = open_checked(root)
    card = model_card(bundle, repo_id, constants.ENDPOINT, licence)
    names = [MANIFEST, *bundle.manifest.files]
    api = HfApi()
    with _explained(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        parent = api.model_info(repo_id, revision=branch).sha
        old = _files_there(api, repo_id, parent)
        operations: list[Any] = [CommitOperationDelete(name) for name in sorted(old - set(names))]
        operations.append(CommitOperationAdd(_CARD, card.encode()))
        operations += [CommitOperationAdd(name, str(bundle.root / name)) for name in names]
        made = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Bundle {bundle.root.name}",
            revision=branch,
            parent_commit=parent,
        )
    total = sum(entry.bytes for entry in bundle.manifest.files.values())
    return Pushed(repo_id, made.oid, len(names), total)


def _files_there(api: Any, repo_id: str, commit: str | None) -> set[str]:
    """The files that belong to the bundle in the repository; none if the repository is empty."""
    there = set(api.list_repo_files(repo_id, revision=commit))
    if MANIFEST in there:
        file = Path(api.hf_hub_download(repo_id, MANIFEST, revision=commit))
        try:
            return {MANIFEST, *read_manifest(file.parent)[0].files} & there
        except BundleError:
            pass
    if other := sorted(name for name in there if name not in (_CARD, ".gitattributes") and "LICENSE" not in name):
        raise SourceError(
            f"{repo_id} must be empty or hold a bundle, but it has {other[0]} and no manifest of a bundle; "
            "push to another name"
        )
    return set()


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn the exceptions of the hub's client into a `SourceError` that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    login = "log in with `hf auth login` and a token that may write there"
    try:
        yield
    except LocalTokenNotFoundError:
        raise SourceError(f"{repo_id}: the hub needs a login; {login}") from None
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403, 404):
            raise SourceError(f"{repo_id}: the hub refuses to write there (status {status}); {login}") from None
        if status == 412:
            raise SourceError(f"{repo_id} was changed during this push; run the same command again") from None
        raise SourceError(f"{repo_id}: {_reason(e)}; run the same command again") from None
    # The client raises RuntimeError for an upload that failed, with the reason as its cause.
    except (OSError, HTTPError, RuntimeError, ValueError) as e:
        raise SourceError(
            f"{repo_id}: the upload was interrupted ({_reason(e)}); run the same command again to continue it"
        ) from None


def _reason(e: BaseException) -> str:
    text = str(e.__cause__ or e).strip()
    return text.splitlines()[0] if text else type(e).__name__
