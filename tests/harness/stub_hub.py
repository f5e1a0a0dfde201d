"""A hub on 127.0.0.1: what huggingface_hub calls to fetch a snapshot and to make, fill and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_stubtokenstubtokenstub"


@dataclass
class Repo:
    """One repository: the files of its only branch."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    ignored: tuple[str, ...] = ()


@dataclass
class StubHub:
    """Its repositories, what it was asked, and what it shall fail at (method and path pattern to status)."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    """File to the bytes after which the first download of it breaks off."""
    ranges: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{method} {path}")
        for pattern, status in self.hub.failing.items():
            if re.search(pattern, f"{method} {path}"):
                return self._error(status)
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return answer(self, **found.groupdict())
        return self._error(404)

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, Content_Type="application/json")

    def _error(self, status: int, code: str = "") -> None:
        # As the hub does, and as a careless server might: the token comes back in the text.
        text = json.dumps({"error": f"refused {self.headers.get('Authorization', '')}"}).encode()
        self._send(text, status, **({"X_Error_Code": code} if code else {}))

    def _repo(self, name: str) -> Repo | None:
        """The repository if whoever asks may see it; else the answer was given."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self._error(401)
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not token):
            return self._error(401 if not token else 404, "RepoNotFound")
        return repo

    def info(self, name: str, revision: str | None = None) -> None:
        if repo := self._repo(name):
            if revision not in (None, "main", *repo.commits):
                return self._error(404, "RevisionNotFound")
            files = [{"rfilename": file} for file in repo.files]
            gated = "auto" if repo.gated else False
            self._json(
                {"id": name, "sha": repo.commits[-1], "private": repo.private, "gated": gated, "siblings": files}
            )
        return None

    def tree(self, name: str, revision: str) -> None:
        if repo := self._repo(name):
            if repo.gated:
                return self._error(403, "GatedRepo")
            self._json([_entry(path, content) for path, content in repo.files.items()])
        return None

    def paths(self, name: str, revision: str) -> None:
        if repo := self._repo(name):
            self._json(
                [_entry(path, repo.files[path]) for path in parse_qs(self.body.decode())["paths"] if path in repo.files]
            )

    def file(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        if repo.gated:
            return self._error(403, "GatedRepo")
        if path not in repo.files:
            return self._error(404, "EntryNotFound")
        content, status = repo.files[path], 200
        headers = {"ETag": f'"{_oid(content)}"', "X_Repo_Commit": repo.commits[-1]}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            self.hub.ranges.append(found[0])
            start, status = int(found[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        if self.command == "GET" and path in self.hub.cut:
            self._send(content[: self.hub.cut.pop(path)], status, **headers | {"Content_Length": str(len(content))})
            self.close_connection = True
            return None
        return self._send(content, status, **headers)

    def create(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401)
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"url": f"{self.hub.url}/{name}"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo({".gitattributes": b""}, private=private)
        return self._json({"url": f"{self.hub.url}/{name}"})

    def preupload(self, name: str, revision: str) -> None:
        if repo := self._repo(name):
            files = [file["path"] for file in json.loads(self.body)["files"]]
            mode = {True: "lfs", False: "regular"}
            modes = [
                {"path": f, "uploadMode": mode[f.endswith(".safetensors")], "shouldIgnore": f in repo.ignored}
                for f in files
            ]
            self._json({"files": modes})

    def batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            known = wanted["oid"] in self.hub.uploads
            objects.append({**wanted} if known else {**wanted, "actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self._send(b"")

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit") not in (None, repo.commits[-1]):
            return self._error(412)
        for line in lines[1:]:
            value = line["value"]
            assert line["key"] in ("file", "lfsFile"), line["key"]  # nothing is ever deleted
            content = self.hub.uploads[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
            repo.files[value["path"]] = content
        repo.commits.append(f"{len(repo.commits):040x}")
        url = f"{self.hub.url}/{name}/commit/{repo.commits[-1]}"
        return self._json({"success": True, "commitUrl": url, "commitOid": repo.commits[-1], "hookOutput": ""})


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (rf"GET /api/models/{_NAME}", Handler.info),
    (rf"GET /api/models/{_NAME}/revision/{_REVISION}", Handler.info),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}", Handler.tree),
    (rf"POST /api/models/{_NAME}/paths-info/{_REVISION}", Handler.paths),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.upload),
    (rf"(GET|HEAD) /{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler.file),
]


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


@contextmanager
def serve() -> Iterator[StubHub]:
    """A hub that runs until the block ends."""
    hub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
