# SPDX-License-Identifier: Apache-2.0
"""ADE20K-847: the full ADE20K of 2021_17_01, converted on access as its benchmark does it.

The benchmark (MaskFormer's conversion) is not at the original resolution: image and label are resized
so that the short side is at most 512, and the image is saved as JPEG again. Both are done here too, so
that scores can be compared. The index pickle is not needed: pickles from downloads are never opened.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from digseg_jax.data.datasets.decode import LabelValueError, check_size, read_color_label
from digseg_jax.data.datasets.pairs import FileSource, find_root, list_files, list_folders, pair_up
from digseg_jax.data.datasets.spec import IGNORE, DatasetSpec
from digseg_jax.errors import UserError
from digseg_jax.io.image_file import read_image

SHORT_SIDE = 512  # pixels


class ObjectCodes:
    """Reader of *_seg.png: object (R // 10) * 256 + G, instance B; objects not listed are ignored."""

    def __init__(self, spec: DatasetSpec):
        self.lookup = np.full(26 * 256, IGNORE, np.int32)  # R // 10 is 0..25
        for class_id, info in enumerate(spec.classes):
            self.lookup[list(info.raw)] = class_id

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          LabelValueError: a red value that the coding does not have.
        """
        red, green = np.moveaxis(read_color_label(path)[..., :2].astype(np.int32), -1, 0)

        # The coding uses multiples of 10 only: interpolation or lossy saving shows here.
        broken = red % 10 != 0
        if broken.any():
            y, x = np.argwhere(broken)[0]
            raise LabelValueError(
                f"{path}: red is {red[y, x]} at row {y}, column {x}; in this coding it is a multiple "
                "of 10 (was the file resized or saved with loss?)"
            )
        return self.lookup[red // 10 * 256 + green]


class ShortSideSource(FileSource):
    """Source whose examples have a short side of at most 512 pixels."""

    image_is_file = False

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, label_path = self.files(index).values()
        image = read_image(image_path).pixels
        label = self.label(index, image.shape[:2])
        check_size(label_path, label, image)

        # Bilinear and nearest, as in the benchmark; the JPEG comes after resizing.
        size = short_side_size(*label.shape)
        if size != label.shape:
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
            label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
        return {"image": _as_jpeg(image), "label": label, "name": self.pairs[index].name}


def short_side_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) with a short side of at most 512; the longer side is rounded to whole pixels."""
    if min(height, width) <= SHORT_SIDE:
        return height, width
    if width >= height:
        return SHORT_SIDE, round(width / height * SHORT_SIDE)
    return round(height / width * SHORT_SIDE), SHORT_SIDE


def _as_jpeg(image: np.ndarray) -> np.ndarray:
    """The image after Pillow's default JPEG, which the benchmark's files went through."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return np.array(Image.open(buffer))


def open_ade20k_847(spec: DatasetSpec, root: Path, split: str) -> ShortSideSource:
    """Opens images/ADE/{training,validation}/GROUP/SCENE/ADE_*.jpg with ADE_*_seg.png beside it.

    Raises:
      UserError: also for the older release, whose object numbers mean other things.
    """
    what = f"{spec.name} {split}"
    inside = ("ADE20K_2021_17_01",)

    # The release of 2016 would otherwise be found and read with the wrong object numbers.
    if not any((p / "images/ADE").is_dir() for p in (root, root / inside[0])):
        for place in (root, root / "ADE20K_2016_07_26"):
            if (place / "images/training").is_dir():
                raise UserError(
                    f"{what}: {place} is the release of 2016 (or ADEChallengeData2016); its object "
                    "numbers differ: ADE20K_2021_17_01 is needed"
                )

    # All GROUP and SCENE folders are searched; the split follows from the file names.
    root = find_root(root, "images/ADE", inside, what)
    prefix = "ADE_val_" if split == "val" else "ADE_train_"
    images, labels = _files_of(root, prefix)
    return ShortSideSource(root, pair_up(root, images, labels, what), ObjectCodes(spec))


def _files_of(root: Path, prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """Finds images and labels whose names begin with `prefix`: {stem: path relative to root} each."""
    images: dict[str, str] = {}
    labels: dict[str, str] = {}

    # The split follows from the file names, as in the benchmark; folders only say where to look.
    for half in list_folders(root / "images/ADE"):
        for group in list_folders(root / "images/ADE" / half):
            for scene in list_folders(root / "images/ADE" / half / group):
                folder = f"images/ADE/{half}/{group}/{scene}"
                for stem, name in list_files(root / folder, (".jpg",)).items():
                    if stem.startswith(prefix):
                        images[stem] = f"{folder}/{name}"
                for stem, name in list_files(root / folder, ("_seg.png",)).items():
                    if stem.startswith(prefix):
                        labels[stem] = f"{folder}/{name}"
    return images, labels
