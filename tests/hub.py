"""A stand-in for the hub on 127.0.0.1: repositories of models and data sets from folders.

It answers what `huggingface_hub` and `datasets` ask: the account of a repository, its tree, where
paths lead, and files by HEAD and GET with the hub's own headers. `asked` keeps every request.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10_000  # bytes from which a file is served as the hub serves those of LFS


@dataclass(frozen=True, kw_only=True)
class Repo:
    """A folder as a repository of one commit. kind: models | datasets. token: what opens it."""

    kind: str
    folder: Path
    token: str = ""  # empty: open to all

    @property
    def commit(self) -> str:
        """A commit that names the content, as git's do."""
        told = hashlib.sha1(usedforsecurity=False)
        for path in self.files():
            told.update(f"{path} {self.oid(path)}\n".encode())
        return told.hexdigest()

    def files(self) -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def size(self, path: str) -> int:
        return (self.folder / path).stat().st_size

    def oid(self, path: str) -> str:
        data = (self.folder / path).read_bytes()
        if len(data) >= LARGE:
            return hashlib.sha256(data).hexdigest()
        blob = b"blob %d\0" % len(data) + data
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """A file as `tree` and `paths-info` tell it."""
        entry = {"type": "file", "path": path, "size": self.size(path), "oid": self.oid(path)}
        if self.size(path) >= LARGE:
            entry["lfs"] = {"oid": self.oid(path), "size": self.size(path), "pointerSize": 134}
        return entry

    def tree(self, under: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files below a folder; those not directly in it as their folders, unless recursive."""
        start = f"{under}/" if under else ""
        inside = [path for path in self.files() if path.startswith(start)]
        if recursive:
            return [self.entry(path) for path in inside]
        here = [path for path in inside if "/" not in path.removeprefix(start)]
        below = {start + path.removeprefix(start).split("/")[0] for path in set(inside) - {*here}}
        folders = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(below)]
        return [*folders, *(self.entry(path) for path in here)]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The running stand-in: its address, its repositories by kind and id, what it was asked."""

    url: str
    repos: dict[str, Repo]
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[Hub]:
    """Serve repositories, by `org/name`, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(url=f"http://127.0.0.1:{server.server_port}", repos=repos)
    server.daemon_threads = True
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    """api/<kind>/<id>[/revision|tree|paths-info/<rev>[/<path>]] and <id>/resolve/<rev>/<path>."""

    protocol_version = "HTTP/1.1"
    timeout: ClassVar[float] = 10.0
    server: Any

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        self.server.hub.asked.append(f"{self.command} {url.path}")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api":
            kind, name, verb, rest = parts[1], "/".join(parts[2:4]), parts[4:5], parts[5:]
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            own = parts[1:] if kind == "datasets" else parts
            name, verb, rest = "/".join(own[:2]), own[2:3], own[3:]
        repo = self.server.hub.repos.get(name)
        if repo is None or repo.kind != kind:
            self._refuse(404, "RepoNotFound")
        elif rest and rest[0] not in ("main", repo.commit):
            self._refuse(404, "RevisionNotFound")
        elif verb == ["resolve"]:
            self._file(repo, "/".join(rest[1:]))
        elif verb in ([], ["revision"]):
            self._json(self._account(name, repo))
        elif verb == ["tree"]:
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() in ("true", "1")
            found = repo.tree("/".join(rest[1:]), recursive=recursive)
            if found:
                self._json(found)
            else:
                self._refuse(404, "EntryNotFound")
        elif verb == ["paths-info"]:
            asked = _paths(body)
            self._json([repo.entry(path) for path in repo.files() if path in asked])
        else:
            self._refuse(404, "EntryNotFound")

    def _account(self, name: str, repo: Repo) -> dict[str, Any]:
        siblings = [{"rfilename": path, "size": repo.size(path)} for path in repo.files()]
        return {
            "id": name,
            "sha": repo.commit,
            "private": False,
            "gated": "manual" if repo.token else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    def _file(self, repo: Repo, path: str) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.token and given != repo.token:
            self._refuse(403 if given else 401, "GatedRepo")
            return
        if path not in repo.files():
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repo.commit})
            return
        data = (repo.folder / path).read_bytes()
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{repo.oid(path)}"'}
        if len(data) >= LARGE:
            headers |= {"X-Linked-ETag": f'"{repo.oid(path)}"', "X-Linked-Size": str(len(data))}
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and wanted.removeprefix("bytes=").partition("-")[0]:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers)
        else:
            self._send(200, data, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, why: str, headers: dict[str, str] | None = None) -> None:
        self._send(code, b"{}", {"X-Error-Code": why, "X-Error-Message": why, **(headers or {})})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _paths(body: bytes) -> list[str]:
    """Paths that a `paths-info` request names, as JSON or as a form."""
    text = body.decode()
    if text.startswith("{"):
        paths: list[str] = json.loads(text)["paths"]
        return paths
    return parse_qs(text).get("paths", [])
