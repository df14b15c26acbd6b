# SPDX-License-Identifier: Apache-2.0
"""CamVid: images/SPLIT/NAME.{jpg,png} with annotations/SPLIT/NAME.png of values 0..10 and 11 (void)."""

from __future__ import annotations

from pathlib import Path

from digseg_jax.data.readers.index import IndexLabels
from digseg_jax.data.source import FileSource, find_root, pair_folders
from digseg_jax.data.spec import DatasetSpec


def open_camvid(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    root = find_root(root, f"images/{split}", ("camvid", "CamVid"), spec.name)
    folders = (f"images/{split}", f"annotations/{split}")
    pairs = pair_folders(root, *folders, (".jpg", ".png"), (".png",), f"{spec.name} {split}")
    return FileSource(root, pairs, IndexLabels(spec))
