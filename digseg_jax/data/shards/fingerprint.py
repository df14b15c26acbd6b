# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of the files that a split consists of: shards and latents made from it carry it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.shards.records import RecordSource

KEY = "files (names, sizes, times)"  # its name in a plan; the error about a difference prints it


def fingerprint(source: Source) -> str:
    """Digest (24 hex digits) of the names, sizes and times of all files of a split, in their order.

    Prepared shards enter with their checksums, wherever they lie. A file's time is that of its last
    change, in whole seconds: a corrected label is another file.
    """
    digest = hashlib.sha256()

    # Checksums need no file to be looked at.
    if isinstance(source, RecordSource):
        for row in source.shards:
            digest.update(row["sha256"].encode())
        return digest.hexdigest()[:24]

    for path in _files(source):
        try:
            found = path.stat()
        except FileNotFoundError:  # reported when the example is read
            continue

        # The folder's own name, but not its path: a data set may move.
        entry = (path.parent.name, path.name, found.st_size, int(found.st_mtime))
        digest.update(repr(entry).encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()[:24]


def _files(source: Source) -> Iterator[Path]:
    """Yields every file of the examples once; of an example that is a folder, the files in it."""
    seen = set[str]()
    for index in range(len(source)):
        for path in source.files(index).values():
            if (name := os.fspath(path)) in seen:
                continue
            seen.add(name)

            # Data sets of TFDS name their folder instead of a file.
            place = Path(name)
            yield from sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
