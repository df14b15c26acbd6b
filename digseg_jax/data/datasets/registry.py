# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: their specs, and their examples from the official download as it unpacks.

spec("cityscapes").names
open_source("cityscapes", "/data/cityscapes", "val")[0]["label"]
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from digseg_jax.data.datasets.catalog import SPECS
from digseg_jax.data.datasets.readers import folders, pascal
from digseg_jax.data.datasets.readers.ade20k_full import open_ade20k_847
from digseg_jax.data.datasets.readers.deepglobe import open_deepglobe
from digseg_jax.data.datasets.readers.folder import folder_spec, open_folder
from digseg_jax.data.datasets.readers.landcover import open_landcover
from digseg_jax.data.datasets.readers.monuseg import open_monuseg
from digseg_jax.data.datasets.readers.refuge import open_refuge2
from digseg_jax.data.datasets.spec import Color, DatasetSpec
from digseg_jax.data.datasets.splits import split_called
from digseg_jax.errors import UserError, nearest
from digseg_jax.io.storage import as_path


@runtime_checkable
class Source(Protocol):
    """Random access over examples in grain's sense.

    [i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w] with ignore = -1, "name"}.
    """

    image_is_file: bool  # whether an image equals the content of its file

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def files(self, index: int) -> dict[str, Path]:
        """Paths of an example's files: {"image", "label"}."""
        ...


TFDS = "tfds:"  # prefix of data sets that TensorFlow Datasets prepared
# Name of the data set -> function that opens a split: (spec, root, split) -> source.
_OPEN: dict[str, Callable[[DatasetSpec, Path, str], Source]] = {
    "ade20k": folders.open_ade20k,
    "ade20k_847": open_ade20k_847,
    "bdd100k": folders.open_bdd100k,
    "camvid": folders.open_camvid,
    "cityscapes": folders.open_cityscapes,
    "coco_stuff": folders.open_coco_stuff,
    "deepglobe": open_deepglobe,
    "folder": open_folder,
    "landcover": open_landcover,
    "landcover_igbp": open_landcover,
    "monuseg": open_monuseg,
    "pascal_context_59": pascal.open_pascal_context,
    "pascal_context_459": pascal.open_pascal_context,
    "pascal_voc": pascal.open_pascal_voc,
    "pascal_voc_21": pascal.open_pascal_voc,
    "phenobench": folders.open_phenobench,
    "refuge2": open_refuge2,
}


def names() -> tuple[str, ...]:
    """All names that `spec` and `open_source` accept."""
    return tuple(sorted(_OPEN))


def title(name: str, root: str) -> str:
    """A data set as a page names it: of a user's own folder, the folder's name."""
    return os.path.basename(os.path.normpath(root)) if name == "folder" and root else name


@functools.cache
def _listed(name: str) -> DatasetSpec:
    """Spec of a public data set; its class list is read from JSON once."""
    return SPECS[name]()


def spec(name: str, root: str | Path = "") -> DatasetSpec:
    """Spec of a data set; for `folder` and `tfds:NAME` it is read from the files in `root`.

    Raises:
      UserError: no such data set, or a folder without what it needs.
    """
    if name.startswith(TFDS):
        from digseg_jax.data.datasets import tfds  # imports tensorflow_datasets, which is slow

        return tfds.spec(name.removeprefix(TFDS), str(root))
    if name not in _OPEN:
        legal = ", ".join((*names(), f"{TFDS}NAME"))
        raise UserError(f"no data set {name!r}{nearest(name, names())}; legal: {legal}")
    if name != "folder":
        return _listed(name)

    # An empty root would mean the current folder; the class list of a user's own folder lies in it.
    if str(root) == "":
        raise UserError(f"{name}: no folder given; set --config.data.root=DIR (or --root)")
    return folder_spec(Path(as_path(root)))


def official_colors(words: Sequence[str], datasets: Sequence[str]) -> tuple[Color | None, ...]:
    """Official color of each word: that of the class of this name in the first data set that has one.

    None for a word without. Data sets whose classes are listed beside the data have no official colors.
    """
    known: dict[str, Color] = {}
    for name in datasets:
        listed = _listed(name).classes if name in SPECS else ()
        known |= {c.name: c.color for c in listed if c.color and c.name not in known}
    return tuple(known.get(word) for word in words)


def open_source(name: str, root: str | Path, split: str) -> Source:
    """Opens the examples of a split, in a fixed order; nothing is decoded yet.

    Raises:
      UserError: no such data set, split or folder, or files without their partner.
    """
    if name.startswith(TFDS):
        from digseg_jax.data.datasets import tfds

        return tfds.TfdsSource(name.removeprefix(TFDS), str(root), split)

    # Data sets need a folder unless they come with Python packages.
    facts = spec(name, root)
    if str(root) == "" and not facts.from_package:
        raise UserError(f"{name}: no folder given; set --config.data.root=DIR (or --root)")

    # "val" may be asked for where the data set says "validation".
    split = split_called(split, facts.splits)
    if split not in facts.splits:
        raise UserError(f"{name} has no split {split!r}; legal: {', '.join(facts.splits)}")
    return _OPEN[name](facts, Path(as_path(root)), split)
