# SPDX-License-Identifier: Apache-2.0
"""Journal of an evaluation's counts: a killed run continues and ends with the same numbers.

One JSON line per finished piece of work, appended and flushed (in a bucket, one object). A line that
a kill cut short is ignored, and a journal of other weights, settings or data is started over. Only
integers and exact floats are stored, so that reading them back gives exactly what was counted.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

import digseg_jax
from digseg_jax.arraytypes import Params
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import parse_object
from digseg_jax.io.storage import AnyPath, explained, is_remote, write_bytes
from digseg_jax.runtime.collectives import tell_all
from digseg_jax.runtime.distributed import is_main, together

READERS = 32  # objects of a bucket that are read at a time
PATIENCE = 7200.0  # seconds that processes wait for process 0 to read a long journal


class Journal:
    """Finished pieces of work by key.

    Args:
      folder: place of the journal; None keeps it in memory only.
      name: file name without ending.
      identity: digest of weights and settings (`identity_of`); rows of another identity are dropped.

    Raises:
      UserError: the disk or the bucket cannot be written.
    """

    def __init__(self, folder: AnyPath | None, name: str, identity: str):
        self.done: dict[str, Any] = {}
        self._lines: _File | _Objects | None = None
        if folder is None:
            return

        # Objects of a bucket cannot be appended to, so there each row is an object.
        self._lines = (_Objects if is_remote(folder) else _File)(folder, name)
        self.done = {row["key"]: row["value"] for row in self._lines.begin(identity)}

    @classmethod
    def shared(cls, folder: AnyPath, name: str, identity: str) -> Journal:
        """Journal of a job of all processes: process 0 writes it, and all know its content.

        Every process must call it.

        Raises:
          UserError: on every process, if the disk or the bucket cannot be written.
        """
        with together("the journal", PATIENCE):
            journal = cls(folder if is_main() else None, name, identity)
        journal.done = tell_all(journal.done)
        return journal

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __getitem__(self, key: str) -> Any:
        return self.done[key]

    def add(self, key: str, value: Any) -> None:
        """Adds a finished piece of work, JSON-ready.

        When this returns, the piece survives a kill of the process, but not a crash of the machine.
        """
        self.done[key] = value
        if self._lines is not None:
            self._lines.append({"key": key, "value": value})

    def close(self) -> None:
        """Closes the file; what was counted stays readable in memory."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


class _File:
    """NAME.jsonl on a disk: a line with the identity, then one line per piece."""

    _file: TextIO  # open after `begin`

    def __init__(self, folder: Path, name: str):
        self.path = folder / f"{name}.jsonl"

    def begin(self, identity: str) -> list[dict[str, Any]]:
        """Opens the journal of this identity for appending and returns its complete rows."""
        with explained(self.path, "cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(identity)

            # Rewrite the complete rows: the next line must not be appended to half a line.
            scratch = self.path.with_name(self.path.name + ".tmp")
            lines = [json.dumps({"identity": identity}), *(json.dumps(row) for row in whole)]
            scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            scratch.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        return whole

    def _read(self, identity: str) -> list[dict[str, Any]]:
        """Complete rows of this identity; none if the file belongs to another one."""
        if not self.path.is_file():
            return []

        # A line cut short by a kill is the last one; nothing after it can be trusted.
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(parse_object(line))
            except ValueError:
                break
        rows = rows if rows and rows[0] == {"identity": identity} else []
        return [row for row in rows[1:] if row.keys() == {"key", "value"}]

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row and flushes it to the operating system."""
        with explained(self.path, "cannot be written"):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Objects:
    """NAME/00000.json, NAME/00001.json ... in a bucket, which cannot append: one object per piece."""

    def __init__(self, folder: AnyPath, name: str):
        self.folder, self.count, self.identity = epath.Path(folder / name), 0, ""

    def begin(self, identity: str) -> list[dict[str, Any]]:
        """Returns the rows of this identity in their order; removes the rows of any other identity."""
        self.identity = identity

        # Zero-padded numbers: the order of names is the order of the pieces.
        with explained(self.folder, "cannot be read"):
            names = sorted(p.name for p in self.folder.iterdir()) if self.folder.exists() else []

        # Each read waits for its bucket: one after another, ten thousand take hours. The first tells
        # whether there is anything to read.
        rows = [self._row(name) for name in names[:1]]
        if all(row.get("identity") == identity for row in rows):
            with ThreadPoolExecutor(READERS) as pool:
                rows += pool.map(self._row, names[1:])
        if any(row.pop("identity", None) != identity for row in rows):
            with explained(self.folder, "cannot be cleared"):
                self.folder.rmtree()
            return []
        self.count = len(rows)
        return rows

    def _row(self, name: str) -> dict[str, Any]:
        """Content of a piece, with its identity."""
        path = self.folder / name
        with explained(path, "cannot be read"):
            data = path.read_bytes()
        try:
            return parse_object(data)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row as the next object."""
        # `json.dumps` keeps nan, as in the file on a disk; `write_json` would not.
        text = json.dumps({"identity": self.identity} | row)
        write_bytes(self.folder / f"{self.count:05d}.json", text.encode())
        self.count += 1

    def close(self) -> None:
        """Does nothing: every object is complete once written."""


def identity_of(params: Params | None, *facts: Any) -> str:
    """Digest of weights, settings and this program's version, 24 hex digits.

    params: arrays must be addressable by this process; None if it does not hold them.
    facts: JSON-ready, or with a `str` that is the same in every process.
    """
    told = (digseg_jax.__version__, facts)  # another version may count otherwise
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())

    # crc32 of each array: fast, and enough to distinguish two sets of weights.
    for leaf in jax.tree.leaves(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        checksum = zlib.crc32(array)  # type: ignore[arg-type]  # a buffer; stubs know from 3.12 on
        digest.update(checksum.to_bytes(4, "big"))
    return digest.hexdigest()[:24]


def pack(counts: np.ndarray) -> dict[str, list[int]]:
    """Sparse, JSON-ready form of an integer array: shape, flat indices and values of non-zeros."""
    counts = np.asarray(counts)

    # Confusion counts of one image are nearly all zero with a large vocabulary.
    flat = counts.ravel()
    places = np.flatnonzero(flat)
    return {
        "shape": list(counts.shape),
        "places": places.tolist(),
        "values": flat[places].tolist(),
    }


def unpack(packed: dict[str, list[int]]) -> np.ndarray:
    """The int64 array that `pack` was given."""
    flat = np.zeros(int(np.prod(packed["shape"])), np.int64)
    flat[packed["places"]] = packed["values"]
    return flat.reshape(packed["shape"])
