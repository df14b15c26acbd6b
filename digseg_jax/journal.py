# SPDX-License-Identifier: Apache-2.0
"""What an evaluation has counted so far, so that a killed one goes on and ends with the same numbers.

One JSON line per finished piece of work, appended and flushed. A line that a kill cut short is
ignored; a journal of other weights, settings or data is begun anew. Only integers and exact floats go
in, so that what is read back is what was counted.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from digseg_jax.arraytypes import Params


class Journal:
    """Finished pieces by key; `None` as the folder keeps them in memory only."""

    def __init__(self, folder: Path | None, name: str, identity: str):
        self.path = folder / f"{name}.jsonl" if folder is not None else None
        self.done: dict[str, Any] = {}
        self._file = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(identity)
        # rewritten from what was whole: the next line must not be appended to half of one
        scratch = self.path.with_name(self.path.name + ".tmp")
        lines = [json.dumps({"identity": identity}), *(json.dumps(row) for row in whole)]
        scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        scratch.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def _read(self, identity: str) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        if not rows or rows[0] != {"identity": identity}:
            return []
        self.done = {row["key"]: row["value"] for row in rows[1:]}
        return rows[1:]

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __getitem__(self, key: str) -> Any:
        return self.done[key]

    def add(self, key: str, value: Any) -> None:
        """`value`: JSON-ready; it is on disk when this returns (as far as a killed process goes)."""
        self.done[key] = value
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "value": value}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def identity_of(params: Params, *facts: Any) -> str:
    """A digest of weights and settings. The arrays must be addressable by this process."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for leaf in jax.tree.leaves(params):
        checksum = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)))
        digest.update(checksum.to_bytes(4, "big"))
    return digest.hexdigest()[:24]


def pack(counts: np.ndarray) -> dict[str, list[int]]:
    """An integer array as its shape, the places that are not zero and their values."""
    counts = np.asarray(counts)
    flat = counts.ravel()
    places = np.flatnonzero(flat)
    return {
        "shape": list(counts.shape),
        "places": places.tolist(),
        "values": flat[places].tolist(),
    }


def unpack(packed: dict[str, list[int]]) -> np.ndarray:
    """int64 of `pack`."""
    flat = np.zeros(int(np.prod(packed["shape"])), np.int64)
    flat[packed["places"]] = packed["values"]
    return flat.reshape(packed["shape"])
