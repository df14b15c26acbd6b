# SPDX-License-Identifier: Apache-2.0
"""The reference: gradient-boosted trees on a pixel's color and the means of its surroundings."""

from __future__ import annotations

import cv2
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.landcover import TILE, LandCover, Tile

WINDOWS = (9, 41)  # pixels; the means see beyond the tile's border, the convolutions do not
TRAIN_PIXELS = 600_000


def features(image: np.ndarray) -> np.ndarray:
    """float32 [h, w, 9] of uint8 [h, w, 3]: color, and its means over 9 and 41 pixels."""
    image = image.astype(np.float32)
    return np.concatenate([image, *(cv2.blur(image, (w, w)) for w in WINDOWS)], axis=-1)


def pixels(values: np.ndarray, tiles: list[Tile]) -> np.ndarray:
    """Rows of all pixels of the tiles: [tiles * TILE * TILE, ...]."""
    windows = [values[t.top : t.top + TILE, t.left : t.left + TILE] for t in tiles]
    return np.stack(windows).reshape(-1, *values.shape[2:])


def fit_and_count(cover: LandCover, label_set: str, split: str, seed: int = 0) -> np.ndarray:
    """Fits on the training tiles and returns confusion counts [c, c + 1] on the split's."""
    label, n = cover.labels[label_set], len(landcover.LABEL_SETS[label_set])
    table, train = features(cover.image), cover.tiles("train")
    x, y = pixels(table, train), pixels(label, train)
    chosen = np.random.default_rng(seed).choice(len(y), TRAIN_PIXELS, replace=False)
    model = HistGradientBoostingClassifier(max_iter=150, random_state=seed)
    model.fit(x[chosen], y[chosen])
    tiles = cover.tiles(split)
    predicted, true = model.predict(pixels(table, tiles)), pixels(label, tiles).astype(int)
    return np.bincount(true * (n + 1) + predicted, minlength=n * (n + 1)).reshape(n, n + 1)
