# SPDX-License-Identifier: Apache-2.0
"""A data set made of its examples' numbers, and its part of a mixture."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from digseg_jax.data.checked import Guarded
from digseg_jax.data.crops import CropRules
from digseg_jax.data.pipeline import CropWithNames, NamedQueries
from digseg_jax.data.queries import QuerySampler
from digseg_jax.data.stream import Part

CLASSES = 6


class Made:
    """Examples made of their number, of two sizes; the broken ones raise."""

    image_is_file = False

    def __init__(self, count=13, offset=0, broken=()):
        self.count, self.offset, self.broken = count, offset, broken

    def __len__(self):
        return self.count

    def files(self, i):
        return {"image": Path(f"/made/{i}.jpg"), "label": Path(f"/made/{i}.png")}

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError("gone")
        rng = np.random.default_rng([i, self.offset])
        shape = (40, 56) if i % 2 else (64, 48)
        label = cv2.resize(
            rng.integers(-1, CLASSES, (4, 4)).astype(np.int32), shape[::-1],
            interpolation=cv2.INTER_NEAREST_EXACT,
        )  # fmt: skip
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        return {"image": image, "label": label, "name": str(i)}


def part(source, weight=1.0, first=0, on_error="raise", seed=0):
    guarded = Guarded(source, CLASSES, on_error, seed)
    ones = np.ones(CLASSES)
    rows = tuple((first + 2 * c, first + 2 * c + 1) for c in range(CLASSES))
    covers = np.arange(CLASSES, dtype=np.int32)[:, None]
    sampler = QuerySampler(ones, 0.3, confusable=np.eye(CLASSES)[::-1], hard_rate=0.5)
    return Part(guarded, CropWithNames(CropRules(32), NamedQueries(3, sampler, rows, covers)), weight)
