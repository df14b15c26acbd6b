# SPDX-License-Identifier: Apache-2.0
"""Reads REFUGE2: fundus images and BMP masks, found by name wherever the archives put them.

Gray 0 is the cup, 128 the rim of the disc, 255 the background: inverted with respect to the other data
sets, and nothing is ignored. The disc's mask contains the cup (`covers` in the class list).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.decode import LabelValueError, read_gray_label
from digseg_jax.data.datasets.pairs import FileSource, pair_up, walk_files
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.errors import UserError

# File names by split; in the training set g means glaucoma and n no glaucoma.
STEMS = {"train": r"[gn]\d{4}", "val": r"V\d{4}", "test": r"T\d{4}"}
TOLERANCE = 30  # gray levels, for files that went through lossy tools
MASK_FOLDERS = frozenset(("disc_cup_masks", "mask", "masks"))  # the release's, and Kaggle's
_OF_2020 = re.compile(r"refuge-?2[-_ ]?(val|test)", re.IGNORECASE)  # folders of the images of 2020


class DiscCupLabels:
    """Reader of masks: 0 background, 1 rim, 2 cup."""

    def __init__(self, spec: DatasetSpec):
        self.values = np.array([info.raw[0] for info in spec.classes])

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          LabelValueError: a gray value far from all three, or no background anywhere.
        """
        gray = read_gray_label(path)

        # Nearest of the three values, within the tolerance, as a table over all 256 gray levels.
        distance = np.abs(np.arange(256)[:, None] - self.values[None])
        table = np.where(distance.min(axis=1) <= TOLERANCE, distance.argmin(axis=1), -1)
        label = table.astype(np.int32)[gray]
        if (label < 0).any():
            y, x = np.argwhere(label < 0)[0]
            raise LabelValueError(
                f"{path}: gray value {gray[y, x]} at row {y}, column {x}; legal: 0 (cup), 128 (rim of "
                f"the disc), 255 (background), each within {TOLERANCE}"
            )

        # A mask of 0 and 1 (a converted copy) would pass the table as nothing but cup.
        if not (label == 0).any():
            raise LabelValueError(f"{path}: no background (255) anywhere: not a mask of this data set")
        return label


def open_refuge2(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens a split: names g0001.. and n0001.. are train, V0001.. val, T0001.. test.

    These are the 1200 images of 2018, which the release of 2020 has in Train/REFUGE1-*; its own 800, in
    Validation and Test under the same names, are left alone, as are illustrations and __MACOSX. As
    Kaggle packs it: SPLIT/images/NAME.jpg and SPLIT/mask/NAME.bmp or .png, with the same names.

    Raises:
      UserError: a name that occurs twice, or files without their partner.
    """
    # The name alone determines the split, whatever the folders are called.
    what, stem = f"{spec.name} {split}", re.compile(STEMS[split])
    images: dict[str, list[Path]] = {}
    labels: dict[str, list[Path]] = {}
    for file in walk_files(root, (".jpg", ".bmp", ".png")):
        parts = [p.lower() for p in file.parts]
        if not stem.fullmatch(file.stem) or any("illustration" in p for p in parts):
            continue

        # Other releases hold BMPs of other kinds; only the folder of disc and cup masks counts.
        is_mask = file.suffix.lower() != ".jpg" and not MASK_FOLDERS.isdisjoint(parts[:-1])
        side = labels if is_mask else images if file.suffix.lower() == ".jpg" else None
        if side is not None:
            side.setdefault(file.stem, []).append(file)

    masks = {name: _only(found, f"{what}: under {root}") for name, found in labels.items()}
    chosen = {
        name: _only(_nearest(found, masks.get(name)), f"{what}: under {root}")
        for name, found in images.items()
    }
    return FileSource(root, pair_up(root, _texts(chosen), _texts(masks), what), DiscCupLabels(spec))


def _texts(files: dict[str, Path]) -> dict[str, str]:
    """The paths as texts, by name."""
    return {name: str(path) for name, path in files.items()}


def _only(files: list[Path], where: str) -> Path:
    """The single file of a name; of two only the user can say which belongs to the release."""
    if len(files) > 1:
        raise UserError(f"{where}: found both {files[0]} and {files[1]}; keep one")
    return files[0]


def _nearest(files: list[Path], mask: Path | None) -> list[Path]:
    """The images of one name that are of the mask's release: not of 2020, and beside it if one is."""
    first = [f for f in files if not _OF_2020.search(f.parent.as_posix())] or files
    if mask is None:
        return first
    shared = [len(os.path.commonpath([f.parent, mask.parent])) for f in first]
    return [f for f, n in zip(first, shared, strict=True) if n == max(shared)]
