# SPDX-License-Identifier: Apache-2.0
"""Which files a split was made from: shards and latents of other files are not taken for theirs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.shards.records import RecordSource

KEY = "files (names, sizes, times)"  # in a plan; the message of a difference prints it


def fingerprint(source: Source) -> str:
    """Digest, 24 hex digits, of the names, sizes and times of all files of a split, in their order.

    Prepared shards count by their checksums, wherever they lie. The times, in seconds, are those of
    the last change: a corrected label is another file.
    """
    digest = hashlib.sha256()
    if isinstance(source, RecordSource):
        for row in source.shards:
            digest.update(row["sha256"].encode())
        return digest.hexdigest()[:24]

    for path in _files(source):
        try:
            found = path.stat()
        except FileNotFoundError:  # is told when the example is read
            continue
        entry = (path.parent.name, path.name, found.st_size, int(found.st_mtime))
        digest.update(repr(entry).encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()[:24]


def _files(source: Source) -> Iterator[Path]:
    """Every file of the examples, once."""
    seen = set[str]()
    for index in range(len(source)):
        for path in source.files(index).values():
            if (name := os.fspath(path)) in seen:
                continue
            seen.add(name)
            place = Path(name)
            yield from sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
