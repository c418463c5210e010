"""The half of the stand-in for the hub that takes uploads: a repository, a branch, LFS objects, and one commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit


class Uploads(BaseHTTPRequestHandler):
    """Answers the POST and PUT requests of huggingface_hub's client; only the login "writer" may write."""

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._may_write():
            return
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self._branch(match.group(1), match.group(2))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self._preupload(match.group(1), match.group(2), json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._take_commit(match.group(1), match.group(2), body)
        else:
            self._error(404, "EntryNotFound", f"no such address: {path}")

    def do_PUT(self) -> None:
        """The contents of one LFS object; a client does not send its login to that host."""
        oid, data = self.path.rpartition("/")[2], self._body()
        if oid in self.hub.refused_uploads or hashlib.sha256(data).hexdigest() != oid:
            self._error(400, "BadRequest", "the upload broke off")
            return
        self.hub.objects[oid] = data
        self._send(200, b"", {})

    def _body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):  # in chunks
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == "Bearer writer":
            return True
        self._error(401, "", "Invalid username or password.")
        return False

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if (self.hub.folder / name).is_dir():
            known = {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
            self._send(409, json.dumps(known).encode(), {"X-Error-Message": known["error"]})
            return
        (self.hub.folder / name).mkdir(parents=True)
        (self.hub.folder / name / ".gitattributes").write_text("*.onnx filter=lfs\n")
        self.hub.visibility[name] = asked.get("visibility", "public")
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _branch(self, name: str, branch: str) -> None:
        folder = self.hub.folder / f"{name}@{branch}"
        if folder.is_dir():
            self._error(409, "", "Reference already exists")
            return
        shutil.copytree(self.hub.folder / name, folder)
        self._json({})

    def _preupload(self, name: str, revision: str, asked: dict) -> None:
        if not (key := self._key(name, revision)):
            return
        files = []
        for path in (f["path"] for f in asked["files"]):
            mode, oid = ("lfs", 1) if self.is_lfs(path) else ("regular", 0)
            known = {"oid": self.hub.digest(self.hub.folder / key / path)[oid]} if path in self.hub.files(key) else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
        self._json({"files": files})

    def _batch(self, asked: dict) -> None:
        objects = []
        for found in asked["objects"]:
            # Like the real hub's storage, on another host.
            href = f"http://localhost:{self.hub.port}/upload/{found['oid']}"
            new = {} if found["oid"] in self.hub.objects else {"actions": {"upload": {"href": href}}}
            objects.append(found | new)
        self._json({"transfer": "basic", "objects": objects})

    def _take_commit(self, name: str, revision: str, body: bytes) -> None:
        if not (key := self._key(name, revision)):
            return
        header, *operations = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit", self.hub.commit(key)) != self.hub.commit(key):
            self._error(412, "", "A commit has happened since")
            return
        for operation in operations:
            value = operation["value"]
            file = self.hub.folder / key / value["path"]
            if operation["key"] == "deletedFile":
                file.unlink()
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            lfs = operation["key"] == "lfsFile"
            file.write_bytes(self.hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"]))
            self.hub.forget(file)
        self.hub.commits += 1
        commit = self.hub.commit(key)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit})
