"""As much of the Hugging Face Hub as pushing and fetching a small repository takes, on loopback and in memory.

What clients ask for was read off huggingface_hub 2.4: making a repository, how files are to be sent, one commit as lines of
JSON, the tree of a revision, and files with their ETag.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Repositories by name, each a mapping of paths to contents."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        repositories, owner = hub.repositories, hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, bytes]]
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif path == "/api/validate-yaml":
            self._answer({"warnings": [], "errors": []})
        elif path.endswith("/preupload/main"):
            asked = json.loads(content)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self._answer({"files": files})
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), content)
        else:
            self._answer({"error": f"no {path} here"}, 404)

    def _create(self, asked: dict) -> None:
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        self.owner.private[name] = asked.get("private") or asked.get("visibility") == "private"
        self.repositories.setdefault(name, {})
        self._answer({"url": f"{self.owner.url}/{name}", "id": name})

    def _commit(self, name: str, content: bytes) -> None:
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "header":
                self.owner.messages.append(line["value"]["summary"])
            else:
                assert (line["key"], line["value"]["encoding"]) == ("file", "base64")
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.owner.url}/{name}/commit/{COMMIT}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for name, files in self.repositories.items():
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                return self._answer({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            if path.startswith(f"/api/models/{name}/tree/"):
                entries = [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]
                return self._answer(entries)
            file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
            if path.startswith(f"/{name}/resolve/") and file in files:
                return self._send(files[file], "application/octet-stream", 200, {"ETag": f'"{_etag(files[file])}"'})
        return self._answer({"error": f"no {path} here"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), "application/json", status, headers or {})

    def _send(self, content: bytes, kind: str, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
