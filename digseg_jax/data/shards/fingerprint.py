# SPDX-License-Identifier: Apache-2.0
"""Fingerprint of the files that a split consists of: shards and latents made from it carry it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.shards.records import RecordSource
from digseg_jax.errors import UserError

# Names of the two kinds in a plan; the error about a difference prints them.
KEY = "files (names, sizes, times)"
UNTIMED_KEY = "files (names, sizes)"


class StaleShards(UserError):
    """What was made from files that have changed since: it holds the old labels."""


def fingerprint(source: Source, *, times: bool = True) -> str:
    """Digest (24 hex digits) of the names, sizes and times of all files of a split, in their order.

    Prepared shards enter with their checksums, wherever they lie. A file's time is that of its last
    change, in whole seconds: a corrected label is another file. Without `times`, a copy is the same.
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
        entry = (path.parent.name, path.name, found.st_size, int(found.st_mtime) if times else 0)
        digest.update(repr(entry).encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()[:24]


def difference(
    source: Source, made_from: Mapping[str, Any], since: float, *, times: bool = True
) -> str:
    """Says in words how a split's files differ from those that something was made from; "" if not.

    Args:
      source: the split as it is now.
      made_from: manifest with the fingerprints; one of an older version may lack them.
      since: time of the manifest in seconds: files of the same names and sizes that are older than it
        were only copied.
      times: whether the files' times count at all.
    """
    if made_from.get(KEY) in (None, fingerprint(source)):
        return ""
    if made_from.get(UNTIMED_KEY) not in (None, fingerprint(source, times=False)):
        return "the names or sizes of its files are others now"

    if not times:
        return ""

    # Whole seconds, which are all that some stores keep of a manifest's time.
    newer = [p for p in _files(source) if p.exists() and int(p.stat().st_mtime) > int(since)]
    if not newer:
        return ""
    return f"{len(newer)} of its files are newer than what was made from them, such as {newer[0]}"


def check_unchanged(
    source: Source,
    made_from: Mapping[str, Any],
    manifest: Any,
    title: str,
    renewal: str,
    *,
    times: bool = True,
) -> None:
    """Refuses what was made from files that have changed since: it still holds the old labels.

    Args:
      source: the split as it is now.
      made_from: content of the manifest.
      manifest: path of the manifest.
      title: names the split and what was made from it.
      renewal: says how to make it again.
      times: whether the files' times count.

    Raises:
      StaleShards: a file was changed, added or removed.
    """
    if told := difference(source, made_from, float(manifest.stat().mtime), times=times):
        raise StaleShards(
            f"{title}: {told}; {renewal} (if only the times of the files are new: touch {manifest})"
        )


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
