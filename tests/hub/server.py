# SPDX-License-Identifier: Apache-2.0
"""The hub's HTTP API on loopback, as far as `huggingface_hub` needs it to download and push models.

Model info, tree and files as huggingface.co answers them. Small files come from the hub, with the id of
their git object as ETag. Weights are kept elsewhere: the hub redirects to a second port (the content
network, which must not see the token) and tells their SHA-256 and size.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import shutil
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .uploads import Receives, Uploads

LARGE = (".safetensors", ".bin")  # what .gitattributes gives to LFS
_PAGE = 50  # entries of a tree's listing in one answer
_BLOCK = 2**20  # bytes
_WAIT = 0.05  # seconds
_STALL = 60.0  # far longer than any test waits, short enough for one that waits wrongly to end


@dataclass
class _Snapshot:
    """A repository's files at one revision, and the id of that commit."""

    root: Path
    commit: str
    files: dict[str, Path]


@dataclass
class Server:
    """Addresses, faults to come, and what was asked for.

    Attributes:
        endpoint: for HF_ENDPOINT.
        token: what a gated repository wants to see.
        gated: repositories that only a token opens: "org/name".
        forbidden: repositories whose terms the token's owner has not accepted.
        faults: end of a file's path in its repository -> what becomes of the next answers, see `fail`.
        requests: (method, path) of every request, the content network's too.
        sent: file -> bytes of it that were sent.
        received: sizes of the large files that arrived.
        commits: (repository, branch) of every commit.
        private: repositories that were made so.
    """

    folder: Path
    endpoint: str = ""
    storage: str = ""
    token: str = "hf_miniature"
    gated: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    faults: dict[str, tuple[str, int]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)
    commits: list[tuple[str, str]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _commits: dict[Path, _Snapshot] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _servers: list[http.server.ThreadingHTTPServer] = field(default_factory=list)
    _connections: set[socket.socket] = field(default_factory=set)

    def fail(self, ending: str, how: str, times: int = 1_000_000) -> None:
        """Lets the next answers about files (or API paths) with this ending go wrong.

        how: "cut": the connection ends after half of what is left; "reset": the same, with a reset;
            "wrong": one byte is another; "short": the file ends early; "stall": nothing comes any more;
            a number: that HTTP status. Of what is sent to the hub: "cut", or a number; the ending
            "PUT" stands for every large file.
        """
        self.faults[ending] = (how, times)

    def stop(self) -> None:
        """Ends the server; its port then refuses connections."""
        self._stopped.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()
        for connection in list(self._connections):  # kept alive for a next request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """Listens on two free ports of loopback."""
        for handler, name in ((_Hub, "endpoint"), (_Storage, "storage")):
            bound = type(handler.__name__, (handler,), {"state": self})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), bound)
            server.daemon_threads = True
            setattr(self, name, f"http://127.0.0.1:{server.server_port}")
            self._servers.append(server)
            threading.Thread(target=server.serve_forever, args=(_WAIT,), daemon=True).start()

    def commit(self, repository: str, revision: str = "main") -> str:
        """The commit behind a revision."""
        snapshot = self.snapshot(repository, revision)
        assert snapshot is not None, f"{repository} has no revision {revision}"
        return snapshot.commit

    def forget(self, root: Path) -> None:
        """Lets a branch be read again, as another commit."""
        with self._lock:
            self._commits.pop(root, None)

    def fetched(self) -> set[str]:
        """Paths in their repositories of all files of which bytes were sent."""
        return set(self.sent)

    def snapshot(self, repository: str, revision: str) -> _Snapshot | None:
        """The files of a branch, a tag or a commit."""
        root = self.folder / repository
        if not root.is_dir():
            return None
        named = root / urllib.parse.quote(revision, safe="")
        if named.is_dir():
            return self._read(named)
        found = (self._read(path) for path in sorted(root.iterdir()) if path.is_dir())
        return next((s for s in found if s.commit == revision), None)

    def _read(self, root: Path) -> _Snapshot:
        with self._lock:
            if root not in self._commits:
                files = sorted(p for p in root.rglob("*") if p.is_file())
                named = {p.relative_to(root).as_posix(): p for p in files}
                listing = "".join(f"{name} {sha256(path)}\n" for name, path in named.items())
                commit = hashlib.sha1(f"{root.name}\n{listing}".encode()).hexdigest()
                self._commits[root] = _Snapshot(root, commit, named)
            return self._commits[root]

    def take_fault(self, path: str) -> str:
        """What goes wrong with this answer; counts it."""
        with self._lock:
            for ending, (how, times) in self.faults.items():
                if path.endswith(ending) and times:
                    self.faults[ending] = (how, times - 1)
                    return how
        return ""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def setup(self) -> None:
        super().setup()
        self.state._connections.add(self.connection)

    def finish(self) -> None:
        self.state._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        self.state.requests.append((self.command, parts.path))
        with contextlib.suppress(OSError):  # the client may have gone
            self.respond(parts.path, urllib.parse.parse_qs(parts.query))

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def give(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def give_json(self, values: Any, **headers: str) -> None:
        self.give(200, json.dumps(values).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str, message: str) -> None:
        """An error as the hub words it: clients read the headers, not the body."""
        body = json.dumps({"error": message}).encode()
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.give(status, body, **headers)

    def hang_up(self) -> None:
        """Ends the connection without an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def stall(self) -> None:
        """Holds the connection open and says nothing, for a minute or until the server stops."""
        self.state._stopped.wait(_STALL)
        self.close_connection = True

    def send_file(self, name: str, path: Path, **headers: str) -> None:
        """A file or the range of it that was asked for, or what `Server.fail` makes of it."""
        size, first = path.stat().st_size, 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {first}-{size - 1}/{size}"
        fault = self.state.take_fault(name) if self.command == "GET" else ""
        if fault.isdigit():
            return self.refuse(int(fault), "", "refused by the test")
        status, headers = 206 if wanted else 200, {"Accept_Ranges": "bytes"} | headers
        if not fault:
            self._begin(status, size - first, headers)
            if self.command == "GET":
                with path.open("rb") as file:
                    file.seek(first)
                    shutil.copyfileobj(file, self.wfile, _BLOCK)
                self.state.sent[name] = self.state.sent.get(name, 0) + size - first
            return None

        data = path.read_bytes()
        if fault == "wrong":
            middle = (first + len(data)) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        body = data[first:]
        if fault == "short":
            body = body[: len(body) // 2]
            headers.pop("Content_Range", None)

        self._begin(status, len(body), headers)
        if fault in ("cut", "reset", "stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.state.sent[name] = self.state.sent.get(name, 0) + len(body)
        if fault == "stall":
            self.wfile.flush()
            return self.stall()
        if fault == "reset":
            self._reset()
        if fault in ("cut", "reset"):
            self.close_connection = True
        return None

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _reset(self) -> None:
        """Lets the socket's closing send RST instead of FIN."""
        time.sleep(_WAIT)  # what was written is to arrive before
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class _Hub(Uploads, _Handler):
    """huggingface.co itself."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repository, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repository, rest = "/".join(parts[:2]), parts[2:]
        if not self._admits(repository):
            return None
        kind, revision = (rest or ["revision"])[0], (rest[1:] or ["main"])[0]
        snapshot = self.state.snapshot(repository, revision)
        if snapshot is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "resolve":
            return self._resolve(repository, snapshot, "/".join(rest[2:]))

        fault = self.state.take_fault(path)
        if fault == "stall":
            return self.stall()
        if fault:
            return self.refuse(int(fault), "", "refused by the test")
        if kind == "revision":
            return self.give_json(_info(repository, snapshot, repository in self.state.gated))
        if kind == "tree":
            return self._tree(snapshot, path, query)
        return self.refuse(404, "", f"no such route: {path}")

    def _admits(self, repository: str) -> bool:
        """Answers and returns False where the repository is missing or closed to this client."""
        sent = self.headers.get("Authorization")
        if sent not in (None, f"Bearer {self.state.token}"):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif not (self.state.folder / repository).is_dir():
            # strangers are not told whether a name exists
            if sent:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:
                self.refuse(401, "", "Invalid username or password.")
        elif repository in self.state.gated and not sent:
            self.refuse(401, "GatedRepo", f"Access to model {repository} is restricted.")
        elif repository in self.state.forbidden:
            self.refuse(403, "GatedRepo", f"Access to model {repository} is restricted.")
        else:
            return True
        return False

    def _tree(self, snapshot: _Snapshot, path: str, query: dict[str, list[str]]) -> None:
        """One page of the listing; a Link header names the next."""
        first = int(query.get("cursor", ["0"])[0])
        entries = [_entry(name, file) for name, file in snapshot.files.items()]
        headers = {}
        if first + _PAGE < len(entries):
            more = urllib.parse.urlencode({"recursive": "true", "cursor": first + _PAGE})
            headers["Link"] = f'<{self.state.endpoint}{path}?{more}>; rel="next"'
        self.give_json(entries[first : first + _PAGE], **headers)

    def _resolve(self, repository: str, snapshot: _Snapshot, name: str) -> None:
        """A small file itself, or where the content network has a large one."""
        commit = {"X_Repo_Commit": snapshot.commit}
        if name not in snapshot.files:
            message = f"Entry not found: {name}"
            return self.give(404, b"", X_Error_Code="EntryNotFound", X_Error_Message=message, **commit)
        file = snapshot.files[name]
        if not name.endswith(LARGE):
            return self.send_file(name, file, ETag=f'"{git_id(file)}"', **commit)
        revision = urllib.parse.quote(snapshot.root.name, safe="%")
        location = f"{self.state.storage}/{repository}/{revision}/{name}"
        linked = {"X_Linked_ETag": f'"{sha256(file)}"', "X_Linked_Size": str(file.stat().st_size)}
        return self.give(302, b"", Location=location, **linked, **commit)


class _Storage(Receives, _Handler):
    """The content network: files by the address that the hub signed, no token."""

    def respond(self, path: str, query: dict[str, list[str]]) -> None:
        if self.headers.get("Authorization"):
            return self.refuse(400, "", "a token was sent to the content network")
        file = self.state.folder / path.strip("/")
        name = "/".join(path.strip("/").split("/")[3:])
        if not file.is_file():
            return self.give(404)
        return self.send_file(name, file, ETag=f'"{git_id(file)}"')


@contextlib.contextmanager
def serve(folder: Path, **options: Any) -> Iterator[Server]:
    """Serves what `write_all` wrote in `folder`; options are attributes of `Server`."""
    server = Server(folder, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def sha256(path: Path) -> str:
    """Computed once for a file's size and date: the real hub knows it too when it is asked."""
    facts = path.stat()
    return _sha256(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=10_000)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_id(path: Path) -> str:
    """The id of a file as an object of git, which holds a pointer to a large one."""
    data = path.read_bytes() if path.suffix not in LARGE else _pointer(path)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(path: Path) -> bytes:
    lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{sha256(path)}"
    return "\n".join((*lines, f"size {path.stat().st_size}", "")).encode()


def _info(repository: str, snapshot: _Snapshot, gated: bool) -> dict[str, Any]:
    return {
        "_id": snapshot.commit[:24],
        "id": repository,
        "modelId": repository,
        "author": repository.split("/")[0],
        "sha": snapshot.commit,
        "private": False,
        "gated": "auto" if gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": name} for name in snapshot.files],
    }


def _entry(name: str, file: Path) -> dict[str, Any]:
    """A file's line in a tree's listing."""
    size = file.stat().st_size
    entry = {"type": "file", "oid": git_id(file), "size": size, "path": name}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(file), "size": size, "pointerSize": len(_pointer(file))}
    return entry
