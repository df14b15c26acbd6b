# SPDX-License-Identifier: Apache-2.0
"""Files of JSON lines that grow with a run, on a disk or in a bucket, and are cut on resume.

On a disk each line is flushed at once. A bucket cannot append: there the file is kept locally and
uploaded as a whole, in the background at most every `UPLOAD_EVERY` seconds, and by `sync`. The training
loop calls `sync` before each checkpoint, so that no step of a checkpoint is missing from the record.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from digseg_jax.errors import Transient, UserError
from digseg_jax.io import storage
from digseg_jax.io.json_file import parse_object
from digseg_jax.io.storage import AnyPath
from digseg_jax.log import log

UPLOAD_EVERY = 30.0  # seconds


def read_rows(path: AnyPath) -> list[dict[str, Any]]:
    """Reads the objects of a file of JSON lines, each with an integer "step".

    A half-written last line, as a killed run leaves it, is skipped.

    Raises:
      UserError: the file is missing, or any other line is not such an object.
    """
    with storage.explained(path, "cannot be read"):
        # Bytes that are not UTF-8 (a torn line) become replacement characters, and the line no JSON.
        text = path.read_bytes().decode("utf-8", errors="replace")

    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # only text after the last newline can be half a line
            raise UserError(f"{path} line {number} is not a JSON object with an integer 'step'")
    return rows


def cut(path: AnyPath, last: float | None) -> None:
    """Drops lines after step `last` (None: no limit) and a half-written one, in one atomic rewrite."""
    if not path.exists():
        return

    # Also without a limit: a line that a killed run left half-written has to go.
    last = math.inf if last is None else last
    kept = "".join(_dump(row) for row in read_rows(path) if row["step"] <= last).encode()
    # Unchanged files are not written: in a bucket, each write uploads the whole object.
    if kept != path.read_bytes():
        storage.write_bytes(path, kept)


class Record:
    """Appends rows to `path`; on resume from step `truncate_after`, drops the later ones first.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(self, path: AnyPath, truncate_after: int | None = None):
        self.path = path
        with storage.explained(path, "cannot be written"):
            cut(path, truncate_after)  # first, so that what is fetched below is already cut

            # In a bucket, the file so far is fetched: each upload replaces the whole object.
            self.mirror = Mirror(path.parent) if storage.is_remote(path) else None
            folder = self.mirror.local if self.mirror else path.parent
            folder.mkdir(parents=True, exist_ok=True)
            if self.mirror and path.exists():
                (folder / path.name).write_bytes(path.read_bytes())
            self._file = (folder / path.name).open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; raises UserError if the disk refuses it."""
        with storage.explained(self.path, "cannot be written"):
            self._file.write(_dump(row))
            self._file.flush()
        if self.mirror:
            self.mirror.maybe_upload()

    def sync(self) -> None:
        """Returns when every row so far is in its final place; raises UserError if a bucket refuses."""
        if self.mirror:
            self.mirror.upload()

    def leave(self, kind: type[BaseException] | None = None) -> None:
        """Closes the file, and uploads to a bucket what `sync` has not.

        Args:
          kind: type of the exception that ends the run. What led to it is uploaded as well, but where
            the bucket refuses that, the first reason is the one to be told.
        """
        self._file.close()
        if not self.mirror:
            return
        if kind is None:
            self.mirror.close()
            return
        try:
            # A bucket that does not answer would only be waited for once more.
            self.mirror.close(upload=not issubclass(kind, Transient))
        except UserError as error:
            log.warning("the last rows are lost: %s", error)

    def close(self) -> None:
        """Closes the file at the regular end of a run."""
        self.leave()


class Mirror:
    """A local folder whose changed files are uploaded to a folder in a bucket.

    Its files must only grow: a file counts as changed when its size does.
    """

    def __init__(self, remote: AnyPath, clock: Callable[[], float] = time.monotonic):
        self.remote, self._clock = remote, clock
        self.local = Path(tempfile.mkdtemp(prefix="digseg_jax_"))
        self._sent: dict[Path, int] = {}  # file -> bytes already uploaded
        self._last = clock()

        # One worker, so uploads never overtake each other.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "upload")
        self._running: concurrent.futures.Future | None = None

    def maybe_upload(self) -> None:
        """Starts an upload in the background if the last one is `UPLOAD_EVERY` seconds ago.

        An upload that failed is logged and tried again; only `upload` raises.
        """
        if self._running and not self._running.done():
            return

        if self._running and (error := self._running.exception()):
            log.warning("%s; trying again", error)
            self._running = None

        if self._clock() - self._last >= UPLOAD_EVERY:
            self._last = self._clock()
            self._running = self._pool.submit(self._send)

    def upload(self) -> None:
        """Uploads what has changed, and waits for it; raises UserError if the bucket refuses."""
        if self._running:
            concurrent.futures.wait([self._running])
            self._running = None
        self._send()
        self._last = self._clock()

    def _send(self) -> None:
        """Uploads each file that has grown."""
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            data = file.read_bytes()
            if self._sent.get(file) != len(data):  # files only grow
                storage.write_bytes(self.remote / file.relative_to(self.local).as_posix(), data)
                self._sent[file] = len(data)  # after the write: a failed upload is tried again

    def close(self, *, upload: bool = True) -> None:
        """Uploads once more if asked, and removes the local folder."""
        try:
            if upload:
                self.upload()
        finally:
            self._pool.shutdown()
            shutil.rmtree(self.local, ignore_errors=True)


def _parse(line: str) -> dict[str, Any] | None:
    """The row in a line; None if it is no JSON object with an integer "step"."""
    try:
        row = parse_object(line)
    except ValueError:
        return None
    return row if isinstance(row.get("step"), int) else None


def _dump(row: Mapping[str, Any]) -> str:
    """Formats one line of strict JSON; NaN and infinity are errors: other readers do not know them."""
    return json.dumps(row, allow_nan=False) + "\n"
