# SPDX-License-Identifier: Apache-2.0
"""Composes stamps on satellite photographs: an image, and the stamp that each pixel belongs to."""

from __future__ import annotations

import cv2
import numpy as np

from digseg_jax.data.datasets import landcover
from digseg_jax.errors import UserError
from tests.bench.stamp_files import Stamp

SCALE = (0.35, 0.65)  # long side of a pasted stamp, as a share of the scene's side
VISIBLE = 0.6  # share of a stamp's pixels that those above it must leave
TRIES = 50


class Scenes:
    """Scenes of some stamps on crops of some tiles; `size` pixels a side."""

    def __init__(self, stamps: list[Stamp], split: str, size: int):
        self.names = sorted({s.name for s in stamps})
        self.stamps = {n: [s for s in stamps if s.name == n] for n in self.names}
        self.cover = landcover.load()
        self.tiles = self.cover.tiles(split)
        self.size = size

    def scene(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [s, s, 3] and label uint16 [s, s]: 0 background, i + 1 for names[i].

        Raises:
          UserError: the stamps are too thin to be seen at this size.
        """
        count = int(rng.integers(2, 4))
        for _ in range(TRIES):
            image, label = self._background(rng), np.zeros((self.size, self.size), np.uint16)
            pasted = {}
            for k in rng.permutation(len(self.names))[:count]:
                cutout, top, left = self._placed(int(k), rng)
                pasted[int(k) + 1] = paste(image, label, cutout, top, left, int(k) + 1).sum()
            shown = [(label == value).sum() / max(n, 1) for value, n in pasted.items()]
            if min(shown) >= VISIBLE:
                return image, label
        raise UserError(f"--size={self.size}: in {TRIES} tries no scene shows its stamps; larger?")

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        tile = self.tiles[int(rng.integers(len(self.tiles)))]
        image = self.cover.window(tile.top, tile.left, landcover.TILE)["image"]
        return cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)

    def _placed(self, k: int, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
        """One of the images of names[k] at its size in the scene, uint8 [h, w, 4]; top, left."""
        choice = self.stamps[self.names[k]]
        rgba = choice[int(rng.integers(len(choice)))].rgba
        side = rng.uniform(*SCALE) * self.size / max(rgba.shape[:2])
        h, w = (max(1, round(n * side)) for n in rgba.shape[:2])
        small = shrunk(rgba, h, w)
        small = small[:, ::-1] if rng.integers(2) else small
        top, left = (int(rng.integers(self.size - n + 1)) for n in (h, w))
        return small, top, left


def shrunk(rgba: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 4] at another size; colors are averaged by alpha, so hidden ones stay hidden."""
    weighted = rgba.astype(np.float32)
    weighted[..., :3] *= weighted[..., 3:]
    small = cv2.resize(weighted, (width, height), interpolation=cv2.INTER_AREA)
    small[..., :3] /= np.maximum(small[..., 3:], 1e-6)
    return small.round().clip(0, 255).astype(np.uint8)


def paste(
    image: np.ndarray, label: np.ndarray, cutout: np.ndarray, top: int, left: int, value: int
) -> np.ndarray:
    """Draws uint8 [h, w, 4] onto both in place; returns where it now is, bool as label.

    The image is mixed by alpha; the label is `value` where the cut-out is more than half opaque.
    """
    h, w = cutout.shape[:2]
    place = (slice(top, top + h), slice(left, left + w))
    alpha = cutout[..., 3:].astype(np.float32) / 255
    mixed = alpha * cutout[..., :3] + (1 - alpha) * image[place]
    image[place] = mixed.round().astype(np.uint8)
    inside = np.zeros(label.shape, bool)
    inside[place] = cutout[..., 3] > 127
    label[inside] = value
    return inside
