"""A local stand-in for the Hugging Face hub: serves a folder `owner/name/...` to huggingface_hub's client on 127.0.0.1.

A folder `owner/name@branch` is another branch of a repository. The login "writer" may upload; see `hub_uploads`.

with Hub(release(tmp_path / "hub")) as hub:
    subprocess.run(command, env=os.environ | hub.environment(tmp_path / "home"))
    hub.downloads  # names of the files that were fetched
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from safetensors import safe_open
from safetensors.torch import save_file

from tests.hub_uploads import Uploads

GOLDEN = Path(__file__).parent / "golden"
FLUX, QWEN, ARCFLOW = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image", "ymyy307/ArcFlow"
SUBFOLDERS = {"flux": "arcflow-flux-2steps", "qwen": "arcflow-qwen-2steps"}
#: Files that no stage may download: some of the released repositories, some common in other repositories.
DECOYS = {
    FLUX: (
        ".gitattributes",
        "LICENSE.md",
        "README.md",
        "ae.safetensors",
        "dev_grid.jpg",
        "flux1-dev.safetensors",
        "scheduler/README.md",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model-00001-of-00002.fp16.safetensors",
        "text_encoder_2/model.safetensors.index.fp16.json",
        "transformer/diffusion_pytorch_model.bf16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ),
    QWEN: (".gitattributes", "LICENSE", "README.md", "tokenizer/chat_template.jinja"),
    ARCFLOW: (".gitattributes", "README.md", "assets/teaser.png", "arcflow-flux-2steps/training_args.bin"),
}
#: Repository -> component -> number of files that its released weights are split into.
_SHARDS = {
    FLUX: {"transformer": 3, "text_encoder_2": 2},
    QWEN: {"transformer": 9, "text_encoder": 4},
}


@dataclass(frozen=True)
class Request:
    """One HTTP request that the hub received: `start` is the first byte requested, `status` that of the answer."""

    method: str
    path: str
    start: int
    status: int


def release(folder: Path, decoys: bool = True) -> Path:
    """Write the golden checkpoints into `folder` under the released names, split as released, and return `folder`."""
    for name, repository in (("flux", FLUX), ("qwen", QWEN)):
        shutil.copytree(GOLDEN / f"{name}-tiny" / "base", folder / repository)
        shutil.copytree(GOLDEN / f"{name}-tiny" / "adapter", folder / ARCFLOW / SUBFOLDERS[name])
        for component, count in _SHARDS[repository].items():
            _split(next((folder / repository / component).glob("*.safetensors")), count)
    for repository, names in DECOYS.items() if decoys else ():
        for name in names:
            path = folder / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not to be fetched")
    return folder


def _split(file: Path, count: int) -> None:
    with safe_open(file, framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - not a dict
    keys, weight_map = sorted(tensors), {}
    for i in range(count):
        name = f"{file.stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(keys[i::count], name)
        save_file({key: tensors[key] for key in keys[i::count]}, file.with_name(name), metadata={"format": "pt"})
    index = {"metadata": {"total_size": file.stat().st_size}, "weight_map": weight_map}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()


class Hub:
    """Serves the repositories in a folder, each with one commit on every branch; use it as a context manager.

    Like the real hub, it lists gated repositories to everybody, redirects downloads of weights to another host, and
    names each error in a header.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.refused_uploads: set[str] = set()
        self.visibility: dict[str, str] = {}
        self.commits = 0
        self._gates: dict[str, str | None] = {}
        self._cuts: dict[str, int] = {}
        self._digests: dict[Path, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Accept no more connections. Open ones stay usable, and a client may reuse one for its next request."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment variables that make a process use this hub, with its cache below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def connect(self, monkeypatch, home: Path) -> Path:
        """Make the client in this process use this hub, with its cache below `home`; returns the cache folder.

        The client reads its environment variables only once, at import, so its constants are patched too.
        """
        from huggingface_hub import close_session, constants

        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        url = f"{self.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        return home / "hub"

    @property
    def downloads(self) -> list[str]:
        """The files that were downloaded, as sorted `owner/name/file`; a file appears once per request."""
        found = (re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", r.path) for r in self.requests if r.method == "GET")
        return sorted(f"{match.group(1)}/{match.group(2)}" for match in found if match)

    def commit(self, name: str) -> str:
        """The commit hash of repository `name`."""
        files = "".join(f"{path} {self.digest(self.folder / name / path)[0]}\n" for path in self.files(name))
        return hashlib.sha1(files.encode()).hexdigest()

    def gate(self, name: str, token: str | None = None) -> None:
        """Make repository `name` gated: only a login with `token` may download its files, or nobody if it is None."""
        self._gates[name] = token

    def cut(self, path: str, after_bytes: int) -> None:
        """Send only the first `after_bytes` bytes of `owner/name/file`, in one answer or several, then disconnect."""
        self._cuts[path] = after_bytes

    def mend(self) -> None:
        """Undo all `cut` calls."""
        self._cuts.clear()

    def files(self, name: str) -> list[str]:
        """The names of all files of repository `name`."""
        root = self.folder / name
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def forget(self, file: Path) -> None:
        """Hash `file` again, because it has changed."""
        self._digests.pop(file, None)

    def digest(self, file: Path) -> tuple[str, str]:
        """The git blob hash of a file, and its SHA-256."""
        with self._lock:
            if file not in self._digests:
                data = file.read_bytes()
                git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                self._digests[file] = (git, hashlib.sha256(data).hexdigest())
            return self._digests[file]


class _Handler(Uploads):
    """Answers the requests of one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Print nothing; `Hub.requests` is the log."""

    @staticmethod
    def is_lfs(path: str) -> bool:
        return path.endswith((".safetensors", ".bin", ".model", ".msgpack", ".jpg", ".png", ".onnx"))

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match.group(1), match.group(2) or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check", path):
            if self._key(match.group(1), "main") and self._admitted(match.group(1)):
                self._json({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match.group(1), match.group(2))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match.group(1), match.group(2), match.group(3))
        elif match := re.fullmatch(r"/lfs/([^/]+/[^/]+)/(.+)", path):
            self._content(match.group(1), match.group(2))
        else:
            self._error(404, "EntryNotFound", f"no such address: {path}")

    def _key(self, name: str, revision: str) -> str | None:
        """The folder of a branch or commit; None after answering with an error if the repository or it is unknown."""
        if not (self.hub.folder / name).is_dir():
            # Like the real hub, do not tell a client without a login whether a repository exists.
            known = "Authorization" in self.headers
            self._error(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        owner, base = name.split("/")
        others = {p.name.partition("@")[2]: f"{owner}/{p.name}" for p in (self.hub.folder / owner).glob(f"{base}@*")}
        for branch, key in ({"main": name} | others).items():
            if revision in (branch, self.hub.commit(key)):
                return key
        self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _info(self, name: str, revision: str) -> None:
        if key := self._key(name, revision):
            siblings = [{"rfilename": path} for path in self.hub.files(key)]
            self._json({"id": name, "modelId": name, "sha": self.hub.commit(key), "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        if not (key := self._key(name, revision)):
            return
        entries = []
        for path in self.hub.files(key):
            file = self.hub.folder / key / path
            git, sha256 = self.hub.digest(file)
            entry = {"type": "file", "path": path, "size": file.stat().st_size, "oid": git}
            if self.is_lfs(path):
                entry["lfs"] = {"oid": sha256, "size": entry["size"], "pointerSize": 135}
            entries.append(entry)
        self._json(entries)

    def _file(self, name: str, revision: str, path: str) -> None:
        key = self._key(name, revision)
        if not key or not self._admitted(name):
            return
        commit, file = self.hub.commit(key), self.hub.folder / key / path
        if not file.is_file():
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        git, sha256 = self.hub.digest(file)
        if not self.is_lfs(path):
            self._content(key, path, {"ETag": f'"{git}"', "X-Repo-Commit": commit})
            return
        size = str(file.stat().st_size)
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": size, "X-Linked-ETag": f'"{sha256}"'}
        # "localhost" is another host name than 127.0.0.1, as the real hub's storage is on another host.
        self._send(302, b"", headers | {"Location": f"http://localhost:{self.hub.port}/lfs/{key}/{path}"})

    def _admitted(self, name: str) -> bool:
        if name not in self.hub._gates:
            return True
        login, token = self.headers.get("Authorization"), self.hub._gates[name]
        if login is None:
            self._error(401, "GatedRepo", f"Access to model {name} is restricted. You must log in")
        elif token is None or login != f"Bearer {token}":
            self._error(403, "GatedRepo", f"Access to model {name} is restricted and you are not in the list")
        else:
            return True
        return False

    def _content(self, name: str, path: str, headers: dict[str, str] | None = None) -> None:
        if headers is None and "Authorization" in self.headers:
            self._error(400, "BadRequest", "the login was sent to another host")
            return
        data = (self.hub.folder / name / path).read_bytes()
        start = self._start()
        headers = {"Accept-Ranges": "bytes"} | (headers or {})
        if start >= len(data) > 0:
            self._error(416, "BadRange", "Range not satisfiable", {"Content-Range": f"bytes */{len(data)}"})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, self.hub._cuts.get(f"{name}/{path}"))

    def _start(self) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match.group(1)) if match else 0

    def _json(self, data: object) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), named | (headers or {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        start = self._start()
        self.hub.requests.append(Request(self.command, self.path, start, status))
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None:
            body = body[: max(cut - start, 0)]
            self.close_connection = True
        self.wfile.write(body)
