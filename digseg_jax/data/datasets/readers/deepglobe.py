# SPDX-License-Identifier: Apache-2.0
"""DeepGlobe roads: train/ID_sat.jpg with train/ID_mask.png; gray values, road from 128 on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.decode import LabelValueError, read_gray_label
from digseg_jax.data.datasets.pairs import FileSource, find_root, list_files, pair_up, pick
from digseg_jax.data.datasets.spec import DatasetSpec, shipped_list

ROAD_FROM = 128  # the organizers' rule: the values are not purely 0 and 255


class RoadLabels:
    """Reader of masks: 1 (road) from gray value 128 on, else 0; nothing is ignored, 255 is road."""

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          LabelValueError: a mask that holds ids instead of gray values.
        """
        gray = read_gray_label(path)

        # A mask of 0 and 1 (a converted copy) would have no road at all.
        if gray.max() == 1:
            raise LabelValueError(
                f"{path}: values 0 and 1 only; the official masks are gray with road from 128 on"
            )
        return (gray >= ROAD_FROM).astype(np.int32)


def open_deepglobe(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens a split of the 6,226 images in `train`, the only ones with public masks.

    test: the 1,530 images that research papers test on (the list of CoANet and earlier work); train:
      the other 4,696; all: every image.

    Raises:
      UserError: no such folder, or files without their partner.
    """
    what = f"{spec.name} {split}"
    root = find_root(root, "train", ("deepglobe", "DeepGlobe", "road"), what)

    # Pairs of the whole folder are checked, whatever the split: a partial download shows here.
    images = _in_train(root, "_sat.jpg")
    labels = _in_train(root, "_mask.png")
    pair_up(root, images, labels, what)

    # The release defines no split: the list of earlier papers does.
    stems = list(images)
    if split == "test":
        stems = shipped_list("deepglobe_test")
    elif split == "train":
        stems = sorted(set(stems) - set(shipped_list("deepglobe_test")))
    images, labels = (pick(side, stems, root / "train", what) for side in (images, labels))
    return FileSource(root, pair_up(root, images, labels, what), RoadLabels())


def _in_train(root: Path, suffix: str) -> dict[str, str]:
    """Files of the train folder by stem, relative to root."""
    return {stem: f"train/{name}" for stem, name in list_files(root / "train", (suffix,)).items()}
