# SPDX-License-Identifier: Apache-2.0
"""ArrayRecord shards of a split, on a disk or in a bucket: claimed, written whole, counted, read.

While shards are being written, each has a sidecar beside it (its name and `.json`) that says it is in
place; the manifest at the end takes their place. So whatever was killed goes on with what is missing,
and half a shard never has its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from digseg_jax.data.datasets.decode import UnreadableError
from digseg_jax.errors import UserError
from digseg_jax.io.storage import explained

PLAN = "plan.json"
# what goes in is compressed already, or does not compress; one record a group, for random access
_WRITER = "group_size:1,uncompressed"


def shard_name(shard: int, shards: int) -> str:
    return f"shard-{shard:05d}-of-{shards:05d}.array_record"


def sidecar(shard: int, shards: int) -> str:
    return shard_name(shard, shards) + ".json"


def checksum(path: Any) -> str:
    """SHA-256 of a local or remote file, read in pieces."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def claim(folder: epath.Path, plan: dict[str, Any], remedy: str) -> None:
    """Writes the plan down, or compares: shards of two plans would make a data set of neither.

    remedy: how to name another folder, for the message.

    Raises:
      UserError: the folder holds shards of another plan.
    """
    path = folder / PLAN
    if not path.exists():
        write(path, json.dumps(plan).encode())
        return
    found = json.loads(path.read_text())
    differs = [key for key in plan if found.get(key) != plan[key]]
    if differs:
        key = differs[0]
        raise UserError(
            f"{folder}: holds shards made with {key}={_short(found.get(key))}, now "
            f"{_short(plan[key])}: choose another {remedy} or remove it"
        )


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def missing(folder: epath.Path, shards: int) -> list[int]:
    """The shards that are still to be written."""
    return [i for i in range(shards) if not (folder / sidecar(i, shards)).exists()]


@contextlib.contextmanager
def new_shard(
    folder: epath.Path, shard: int, shards: int
) -> Iterator[tuple[ArrayRecordWriter, dict[str, Any]]]:
    """A writer of records, and a dict to be filled with facts: counts, statistics.

    When the block has ended well, the shard is moved to its place, then its sidecar is written: the
    facts with "file", "bytes" and "sha256".

    Raises:
      UserError: the disk or the bucket refuses.
    """
    name = shard_name(shard, shards)
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        writer = ArrayRecordWriter(str(path), _WRITER)
        try:
            yield writer, facts
        finally:
            writer.close()
        row = {"file": name, "bytes": path.stat().st_size, "sha256": checksum(path)}
        with explained(folder / name, "cannot be written"):
            move(path, folder / name)
    with explained(folder / sidecar(shard, shards), "cannot be written"):
        write(folder / sidecar(shard, shards), json.dumps(row | facts).encode())


def sidecars(folder: epath.Path, shards: int) -> list[dict[str, Any]]:
    """What all sidecars say, by shard."""
    return [json.loads((folder / sidecar(i, shards)).read_text()) for i in range(shards)]


def remove_sidecars(folder: epath.Path, shards: int) -> None:
    """To be called when a manifest says what they say."""
    for shard in range(shards):
        (folder / sidecar(shard, shards)).unlink()


def write(path: epath.Path, data: bytes) -> None:
    """Whole or not at all; an object of a bucket appears only when it is complete."""
    if str(path).startswith("gs://"):
        path.write_bytes(data)
        return
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)


def move(local: Path, path: epath.Path) -> None:
    """A finished local file to its place, as `write` does it."""
    if str(path).startswith("gs://"):
        epath.Path(local).copy(path, overwrite=True)
        return
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    epath.Path(local).copy(scratch, overwrite=True)
    scratch.replace(path)


class Shards:
    """Random access to the bytes of records; no shard is opened before one of its records is read.

    rows: the manifest's, each with "file" and "bytes". counts: how many records each shard has.

    Raises:
      UserError: manifest and shards disagree (a missing shard, or one of another size).
    """

    def __init__(self, folder: epath.Path, rows: Sequence[dict[str, Any]], counts: Sequence[int]):
        self.folder, self.rows = folder, rows
        self._check_sizes()
        self.starts = np.cumsum([0, *counts])
        # with the range of records in the name no shard has to be opened now
        paths = [f"{folder / r['file']}[0:{n}]" for r, n in zip(rows, counts, strict=True)]
        self.records = grain.sources.ArrayRecordDataSource(paths)

    def _check_sizes(self) -> None:
        for row in self.rows:
            path = self.folder / row["file"]
            size = path.stat().length if path.exists() else None
            if size != row["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path}: {found}; the manifest says {row['bytes']} bytes")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> bytes:
        """Raises UnreadableError: a damaged shard."""
        try:
            return self.records[index]
        except (RuntimeError, ValueError) as error:  # what the reader says of a damaged shard
            raise UnreadableError(f"{self.where(index)}: {' '.join(str(error).split())}") from error

    def file(self, index: int) -> epath.Path:
        """The shard that holds a record."""
        return self.folder / self.rows[self._shard(index)]["file"]

    def where(self, index: int) -> str:
        """A record's shard and its place there, for messages."""
        return f"{self.file(index)}, record {index - int(self.starts[self._shard(index)])}"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1
