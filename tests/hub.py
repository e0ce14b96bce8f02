"""A Hugging Face hub on the loopback interface: folders served as repositories."""

import hashlib
import json
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TREE = re.compile(r"/api/(?:model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)")
FILE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

Repos = Mapping[tuple[str, str], Path]


class Hub:
    """Serves models and data sets, from ("owner/name", commit) to a folder, while the `with` block runs.

    `served` lists the files whose content was asked for. A file in `broken` is cut off in its middle by a reset
    connection. `hostile` are files, by name, that every repository lists and serves and no folder could hold.
    """

    def __init__(self, repos: Repos) -> None:
        self.repos = dict(repos)
        self.served: list[str] = []
        self.broken: set[str] = set()
        self.hostile: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextmanager
def serve_hub(repos: Repos) -> Iterator[str]:
    """The address of such a hub, for HF_ENDPOINT."""
    with Hub(repos) as hub:
        yield hub.url


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := TREE.fullmatch(path):
            if folder := self.repository(*found.groups()):
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                entries = [self.entry(file.relative_to(folder).as_posix(), file.read_bytes()) for file in files]
                entries += [self.entry(name, content) for name, content in self.hub.hostile.items()]
                self.answer(200, json.dumps(entries).encode())
        elif found := FILE.fullmatch(path):
            if folder := self.repository(*found.groups()[:2]):
                self.send(found[3], folder / found[3])
        else:
            self.answer(404)

    def repository(self, name: str, commit: str) -> Path | None:
        if (name, commit) not in self.hub.repos:
            known = any(name == repo for repo, _ in self.hub.repos)
            self.answer(404, error="RevisionNotFound" if known else "RepoNotFound")
        return self.hub.repos.get((name, commit))

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send(self, name: str, file: Path) -> None:
        if name not in self.hub.hostile and not file.is_file():
            self.answer(404, error="EntryNotFound")
            return
        content = self.hub.hostile[name] if name in self.hub.hostile else file.read_bytes()
        if self.command == "GET":
            self.hub.served.append(name)
            if name in self.hub.broken:
                self.head(200, content)
                self.wfile.write(content[: len(content) // 2])
                # Lingering for 0 seconds makes closing a reset: the other side sees a fault, not an end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
        self.answer(200, content)

    def answer(self, status: int, content: bytes = b"", error: str = "") -> None:
        self.head(status, content, error)
        if self.command == "GET":
            self.wfile.write(content)

    def head(self, status: int, content: bytes, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
