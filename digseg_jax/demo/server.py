# SPDX-License-Identifier: Apache-2.0
"""The demo's server: answers this machine only, and only who knows the page's address.

Any web page that a browser shows can send requests to 127.0.0.1, also under a name of its own (DNS
rebinding). So every path begins with a secret token, and the headers Host and Origin are checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import io
import json
import re
import secrets
import socket
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digseg_jax.config.sampling import EStep
from digseg_jax.demo.page import MAX_UPLOAD, SAMPLES, Page
from digseg_jax.demo.work import Job, Order, Queue
from digseg_jax.errors import UserError
from digseg_jax.io.image_file import read_image
from digseg_jax.io.names import UNSEEN
from digseg_jax.log import log
from digseg_jax.prediction.answer import MostProbable
from digseg_jax.prediction.files import SHOWN, check_queries
from digseg_jax.segmentation.resize import resize_image
from digseg_jax.viz import images as viz

HOST = "127.0.0.1"
MOST_DROPPED = 4 * MAX_UPLOAD  # bytes of a refused one that are still read
PATIENCE = 2  # seconds without such a byte
MAX_NAME = 255  # characters of a file's name; no system has longer ones
MAX_SAMPLING = 64  # members, and steps of each
SIDES = (256, 512, 1024, 2048)  # longer side of an image as it is segmented, pixels

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
}


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a request is answered with; name: of the file that a browser saves it as."""

    body: bytes
    kind: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    name: str = ""

    @classmethod
    def of(cls, value: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
        """A JSON value."""
        return cls(json.dumps(value).encode(), status=status)

    @classmethod
    def png(cls, image: Image.Image, **options: Any) -> Reply:
        """A PNG."""
        data = io.BytesIO()
        image.save(data, "PNG", **options)
        return cls(data.getvalue(), "image/png")


class Refused(Exception):
    """A request that gets no answer but an error."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class Demo(ThreadingHTTPServer):
    """The server on 127.0.0.1.

    Args:
      queue: segments the images.
      page: what the browser shows.
      port: 0 takes a free one.

    Raises:
      UserError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, queue: Queue, page: Page, port: int = 0):
        self.queue, self.page, self.token = queue, page, secrets.token_urlsafe(18)
        with _told(port):
            super().__init__((HOST, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs an error of a connection; a browser that went away is none."""
        if not isinstance(sys.exception(), ConnectionError):
            log.exception("a request to the demo failed")

    @property
    def url(self) -> str:
        """Address of the page, with the token."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"


def check_port(port: int) -> None:
    """Checks that a port is free, so that a taken one is told before a model is loaded.

    Raises:
      UserError: it is taken, or there is no such port.
    """
    with _told(port):
        socket.create_server((HOST, port)).close()


@contextlib.contextmanager
def _told(port: int) -> Iterator[None]:
    """Turns an error of opening a port into one line that names the flag."""
    try:
        yield
    except (OSError, OverflowError) as error:
        raise UserError(f"--port={port}: cannot be used ({error}); 0 takes a free one") from error


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    server: Demo
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a byte

    def do_GET(self) -> None:
        self._answer(GET)

    def do_POST(self) -> None:
        self._answer(POST)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what the base class refuses, such as too long an address, as the page reads it."""
        told = "too many words for one request" if code == HTTPStatus.REQUEST_URI_TOO_LONG else message
        self.close_connection = True
        self.request_version = self.request_version or self.protocol_version
        self._send(Reply.of({"error": told or "not understood"}, HTTPStatus(code)))

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def version_string(self) -> str:
        return "digseg"

    def _answer(self, routes: dict[str, Callable[..., Reply]]) -> None:
        """Checks who asks, finds the route, and sends what it returns."""
        try:
            self._check_origin()
            path, _, query = self.path.partition("?")
            token, _, rest = path.removeprefix("/").partition("/")
            if not hmac.compare_digest(token.encode(), self.server.token.encode()):
                raise Refused(HTTPStatus.NOT_FOUND, "no such page; open the printed address")

            # The patterns are disjoint, and their groups are the arguments.
            for pattern, make in routes.items():
                if found := re.fullmatch(pattern, urllib.parse.unquote(rest)):
                    reply = make(self, urllib.parse.parse_qs(query), *found.groups())
                    break
            else:
                raise Refused(HTTPStatus.NOT_FOUND, "no such address")
        except UserError as error:
            reply = Reply.of({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except Refused as error:
            # The body, if there is one, was not read.
            self.close_connection = True
            reply = Reply.of({"error": str(error)}, error.status)
        self._send(reply)
        if self.close_connection:
            self._drop_body()

    def _drop_body(self) -> None:
        """Reads what is still sent: a browser that is cut off meanwhile does not show the answer."""
        length = self.headers.get("Content-Length", "")
        left = min(int(length), MOST_DROPPED) if length.isdecimal() else 0
        self.connection.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            while left > 0 and (some := self.rfile.read1(min(left, 2**20))):
                left -= len(some)

    def _check_origin(self) -> None:
        """Raises Refused unless the request is addressed to this server, by a page of its own."""
        names = [f"{name}:{self.server.server_port}" for name in (HOST, "localhost")]
        if self.headers.get("Host") not in names:
            raise Refused(HTTPStatus.FORBIDDEN, "the request was sent to another host's name")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{name}" for name in names]:
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another page")

    def _send(self, reply: Reply) -> None:
        """Sends a reply with the headers of all."""
        self.send_response(reply.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        if reply.name:
            self.send_header("Content-Disposition", f'attachment; filename="{reply.name}"')
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def _body(self) -> bytes:
        """The request's body; raises Refused if it is too long or of unknown length."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request without a length")
        if int(length) > MAX_UPLOAD:
            limit = MAX_UPLOAD // 2**20
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file has more than {limit} MiB")
        return self.rfile.read(int(length))

    def _job(self, job_id: str) -> Job:
        """The order of an address; raises Refused if it was forgotten."""
        job = self.server.queue.get(job_id)
        if job is None:
            raise Refused(HTTPStatus.NOT_FOUND, "these masks were dropped; segment the image again")
        return job

    def _planes(self, job_id: str) -> tuple[Job, np.ndarray]:
        """An order and its soft masks [q, h, w]; raises Refused before the first."""
        job = self._job(job_id)
        if job.planes is None:
            raise Refused(HTTPStatus.NOT_FOUND, "no masks yet")
        return job, job.planes

    def page(self, _: dict) -> Reply:
        """The page itself."""
        return Reply(self.server.page.html.encode(), "text/html; charset=utf-8")

    def sample(self, _: dict, name: str) -> Reply:
        """A sample image."""
        if name not in SAMPLES:
            raise Refused(HTTPStatus.NOT_FOUND, "no such sample")
        return Reply(SAMPLES[name].read_bytes(), "image/jpeg")

    def order(self, query: dict) -> Reply:
        """Puts an image, the body or a sample, into the queue."""
        data, name = self._body(), plain_name(query.get("name", [""])[0])
        if sample := query.get("sample", [""])[0]:
            if sample not in SAMPLES:
                raise UserError(f"sample={sample}: legal are {', '.join(SAMPLES)}")
            data, name = SAMPLES[sample].read_bytes(), SAMPLES[sample].name

        words = tuple(word.strip() for word in query.get("word", []))
        if not words:
            raise UserError("no words: name what to segment")
        check_queries(words, "words")
        self.server.page.check(words)
        image = pixels(data, _whole(query, "side", SIDES[-1]))
        members, steps = (_whole(query, key, MAX_SAMPLING) for key in ("members", "steps"))
        page = self.server.page
        estep = EStep(members, steps, page.spacing)
        job = self.server.queue.put(Order(image, words, estep, page.datasets, name))
        return Reply.of(self.server.queue.facts(job))

    def facts(self, _: dict, job_id: str) -> Reply:
        """State and progress of an order."""
        return Reply.of(self.server.queue.facts(self._job(job_id)))

    def cancel(self, _: dict, job_id: str) -> Reply:
        """Ends an order."""
        job = self._job(job_id)
        self._body()
        self.server.queue.cancel(job)
        return Reply.of(self.server.queue.facts(job))

    def input(self, _: dict, job_id: str) -> Reply:
        """The image as it is segmented."""
        return Reply.png(Image.fromarray(self._job(job_id).order.image))

    def labels(self, _: dict, job_id: str) -> Reply:
        """The most probable word of each pixel in its color; transparent where none exceeds 0.5."""
        job, planes = self._planes(job_id)
        winner = MostProbable(SHOWN)
        for plane in planes:
            winner.see(plane)

        colors = np.concatenate([job.order.colors, [viz.IGNORE_COLOR]]).astype(np.uint8)
        shown = np.dstack([colors[winner.label], np.where(winner.label < 0, 0, 255).astype(np.uint8)])
        return Reply.png(Image.fromarray(shown))

    def mask(self, _: dict, job_id: str, place: str) -> Reply:
        """The soft mask of one word, in gray."""
        planes = self._planes(job_id)[1]
        if int(place) >= len(planes):
            raise Refused(HTTPStatus.NOT_FOUND, "no such word")
        return Reply.png(
            Image.fromarray(np.rint(255 * planes[int(place)].astype(np.float32)).astype("u1"))
        )

    def pixel(self, query: dict, job_id: str) -> Reply:
        """Every word's probability at a pixel, the most probable first."""
        job, planes = self._planes(job_id)
        height, width = planes.shape[1:]
        x, y = _whole(query, "x", width - 1, 0), _whole(query, "y", height - 1, 0)
        found = zip(job.order.words, planes[:, y, x].tolist(), strict=True)
        rows = [{"word": word, "probability": p} for word, p in sorted(found, key=lambda row: -row[1])]
        return Reply.of({"x": x, "y": y, "words": rows})

    def file(self, _: dict, job_id: str, what: str) -> Reply:
        """A file of a finished order, as --mode=predict writes it."""
        job = self._job(job_id)
        if job.state != "done":
            raise Refused(HTTPStatus.NOT_FOUND, "the masks are not complete")
        path: Path = getattr(job.files, what)
        kind = {".png": "image/png", ".json": "application/json"}.get(path.suffix, "application/zip")
        return Reply(path.read_bytes(), kind, name=path.name)


_JOB = r"jobs/([\w-]{1,32})"
GET: dict[str, Callable[..., Reply]] = {
    "": Handler.page,
    r"samples/(\w+)\.jpg": Handler.sample,
    _JOB: Handler.facts,
    rf"{_JOB}/input\.png": Handler.input,
    rf"{_JOB}/labels\.png": Handler.labels,
    rf"{_JOB}/mask/(\d{{1,4}})\.png": Handler.mask,
    rf"{_JOB}/pixel": Handler.pixel,
    rf"{_JOB}/files/(labels|overlay|summary|coco|archive)": Handler.file,
}
POST: dict[str, Callable[..., Reply]] = {"jobs": Handler.order, rf"{_JOB}/cancel": Handler.cancel}


def pixels(data: bytes, side: int) -> np.ndarray:
    """Reads an uploaded file; an image that is longer than `side` pixels is made smaller.

    Raises:
      UserError: not an image, damaged, or too many pixels.
    """
    # By way of a file: there is one reader for all images, with its limits.
    with tempfile.NamedTemporaryFile(prefix="digseg_jax_demo_") as file:
        file.write(data)
        file.flush()
        try:
            image = read_image(Path(file.name)).upright()
        except UserError as error:
            raise UserError(f"the image{str(error).removeprefix(file.name)}") from error

    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    return resize_image(image, max(1, round(height * scale)), max(1, round(width * scale)))


def plain_name(name: str) -> str:
    """The name of an uploaded file without folders and without what cannot be seen; "" for none."""
    last = re.split(r"[/\\]", UNSEEN.sub("", name))[-1].strip()
    return "" if last in (".", "..") else last[:MAX_NAME]


def _whole(query: dict[str, list[str]], name: str, most: int, least: int = 1) -> int:
    """A whole number of the request; raises UserError unless it is in least..most."""
    text = query.get(name, [""])[0]
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise UserError(f"{name}={text}: legal are whole numbers from {least} to {most}")
    return int(text)
