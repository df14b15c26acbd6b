# SPDX-License-Identifier: Apache-2.0
"""ArrayRecord shards of a split, on a disk or in a bucket: claims, writes atomically, checks, reads.

While shards are being written, each finished one has a sidecar beside it (its name and `.json`); the
manifest at the end replaces all sidecars. A killed run therefore continues with the missing shards,
and half a shard never has a shard's name.
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

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.io.json_file import read_json
from digseg_jax.io.storage import explained, inside

PLAN = "plan.json"  # settings that all shards of a folder share
_OWN = "shard-*-of-*.array_record*"  # shards, sidecars, and what a killed job left of them
# Records are compressed already, or do not compress. One record per group for random access.
_WRITER = "group_size:1,uncompressed"


def shard_name(shard: int, shards: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{shard:05d}-of-{shards:05d}.array_record"


def sidecar(shard: int, shards: int) -> str:
    """File name of the sidecar that marks a shard as finished."""
    return shard_name(shard, shards) + ".json"


def checksum(path: Any) -> str:
    """SHA-256 of a local or remote file, read in pieces."""
    digest = hashlib.sha256()
    # 4 MiB at a time: shards may be larger than memory.
    with epath.Path(path).open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def claim(folder: epath.Path, plan: dict[str, Any], remedy: str) -> None:
    """Writes the plan to the folder, or compares it with the one that is there.

    Shards of two plans must not mix in one data set.

    Args:
      folder: where the shards go.
      plan: settings that all of them share, JSON-ready.
      remedy: what to choose instead, for the message.

    Raises:
      UserError: the folder holds shards of another plan.
    """
    path = folder / PLAN
    if not path.exists():
        write(path, json.dumps(plan).encode())
        return

    # A continued run has the same plan; name the first setting that differs. An older plan may lack a
    # setting, and then says nothing about it.
    found = read_json(path, remedy=f"choose {remedy}")
    if key := _first_difference(plan, found):
        raise UserError(
            f"{folder}: holds shards made with {key}={_short(found.get(key))}, now "
            f"{_short(plan[key])}: choose {remedy}"
        )


def clear(folder: epath.Path, plan: dict[str, Any], manifest: str) -> None:
    """Removes the shards of another plan, with what describes them; other files stay.

    manifest: name of the file that makes them a data set.
    """
    # With this very plan they are not old, though perhaps not finished.
    try:
        found = read_json(folder / PLAN)
    except UserError:
        found = {}
    if found and not _first_difference(plan, found):
        return

    # The manifest goes first, so that what is left is never taken for a whole data set.
    with explained(folder, "cannot be emptied"):
        for path in (folder / manifest, *sorted(folder.glob(_OWN)), folder / PLAN):
            path.unlink(missing_ok=True)


def _first_difference(plan: dict[str, Any], found: dict[str, Any]) -> str:
    """The first setting that two plans have both, with other values; "" if there is none."""
    # Earlier versions spelled one fact of a data set in another way.
    if isinstance(spec := found.get("spec"), dict) and "licence" in spec:
        rest = {key: value for key, value in spec.items() if key != "licence"}
        found = found | {"spec": rest | {"license": spec["licence"]}}
    return next((key for key in plan if key in found and found[key] != plan[key]), "")


def _short(value: Any, limit: int = 80) -> str:
    """`repr` of a value, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def missing(folder: epath.Path, shards: int) -> list[int]:
    """Numbers of the shards that are still to be written."""
    return [i for i in range(shards) if not (folder / sidecar(i, shards)).exists()]


@contextlib.contextmanager
def new_shard(
    folder: epath.Path, shard: int, shards: int
) -> Iterator[tuple[ArrayRecordWriter, dict[str, Any]]]:
    """Opens a new shard: yields a record writer, and a dict for its facts (counts, statistics).

    When the block ends without an error, the shard is moved to its place; then its sidecar is written,
    which holds the facts and "file", "bytes" and "sha256".

    Raises:
      UserError: the disk or the bucket cannot be written.
    """
    name = shard_name(shard, shards)
    facts: dict[str, Any] = {}

    # ArrayRecord writes to local files only, so the shard is built on this machine's disk.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        writer = ArrayRecordWriter(str(path), _WRITER)
        try:
            yield writer, facts
        finally:
            writer.close()

        # Not reached after an error in the block: half a shard disappears with the scratch folder.
        row = {"file": name, "bytes": path.stat().st_size, "sha256": checksum(path)}
        with explained(folder / name, "cannot be written"):
            move(path, folder / name)

    # The sidecar comes last: it says that the shard is in place.
    with explained(folder / sidecar(shard, shards), "cannot be written"):
        write(folder / sidecar(shard, shards), json.dumps(row | facts).encode())


def sidecars(folder: epath.Path, shards: int) -> list[dict[str, Any]]:
    """Content of all sidecars, in the order of the shards."""
    # Without its sidecar a shard counts as missing, so a damaged sidecar can simply be removed.
    keys = {"file": str, "bytes": int, "sha256": str}
    remedy = "remove it: its shard is written again"
    return [read_json(folder / sidecar(i, shards), keys, remedy) for i in range(shards)]


def remove_sidecars(folder: epath.Path, shards: int) -> None:
    """Deletes all sidecars; call once the manifest holds their content."""
    for shard in range(shards):
        (folder / sidecar(shard, shards)).unlink()


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file completely or not at all; a bucket shows an object only once it is complete."""
    if str(path).startswith("gs://"):
        path.write_bytes(data)
        return

    # A rename is atomic; the process's number keeps two writers apart.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_bytes(data)
    scratch.replace(path)


def move(local: Path, path: epath.Path) -> None:
    """Moves a finished local file to its place, completely or not at all."""
    if str(path).startswith("gs://"):
        epath.Path(local).copy(path, overwrite=True)
        return

    # Copy first: the scratch folder may be on another disk, where a rename is not possible.
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    epath.Path(local).copy(scratch, overwrite=True)
    scratch.replace(path)


class Shards:
    """Random access to the bytes of records; a shard is opened when one of its records is first read.

    Args:
      folder: where the shards are.
      rows: the manifest's rows, each with "file" and "bytes".
      counts: number of records of each shard.

    Raises:
      UserError: manifest and shards disagree (a missing shard, or one of another size).
    """

    def __init__(self, folder: epath.Path, rows: Sequence[dict[str, Any]], counts: Sequence[int]):
        self.folder, self.rows = folder, rows
        self._check_sizes()
        self.starts = np.cumsum([0, *counts])

        import grain  # here: with its own libraries it takes a second, and prediction reads no shards

        # With the range of records in its name, a shard need not be opened to count them.
        paths = [f"{folder / r['file']}[0:{n}]" for r, n in zip(rows, counts, strict=True)]
        self.records = grain.sources.ArrayRecordDataSource(paths)

    def _check_sizes(self) -> None:
        """Compares each shard's size with the manifest; a checksum would mean reading all of it."""
        for row in self.rows:
            path = inside(self.folder, row["file"])
            size = path.stat().length if path.exists() else None
            if size != row["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path}: {found}; the manifest says {row['bytes']} bytes")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> bytes:
        """Bytes of one record.

        Raises:
          UnreadableError: a damaged shard; names it and the record.
        """
        try:
            return self.records[index]
        except (RuntimeError, ValueError) as error:  # array_record's errors for a damaged shard
            raise UnreadableError(f"{self.where(index)}: {' '.join(str(error).split())}") from error

    def file(self, index: int) -> epath.Path:
        """The shard that holds a record."""
        return self.folder / self.rows[self._shard(index)]["file"]

    def where(self, index: int) -> str:
        """Path of a record's shard and its place there, for messages."""
        return f"{self.file(index)}, record {index - int(self.starts[self._shard(index)])}"

    def _shard(self, index: int) -> int:
        """Number of the shard that holds a record."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1
