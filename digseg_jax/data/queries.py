# SPDX-License-Identifier: Apache-2.0
"""Which classes of a label crop are asked for in training."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class QuerySampler:
    """Draws query classes for a crop: present ones by rarity and area, some absent ones.

    rarity: float [classes], 1 / sqrt(pixel frequency in the training tiles).
    negative_rate: probability that a query is for an absent class (if there is one).
    min_share: a class with a smaller share of the crop is neither present nor absent.
    """

    rarity: np.ndarray
    negative_rate: float
    min_share: float = 0.002

    def __call__(self, label: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """Returns int32 [n] class ids; without repetition while there are enough classes."""
        share = np.bincount(label[label >= 0].ravel(), minlength=len(self.rarity)) / label.size
        present, absent = share > self.min_share, share == 0
        # rare classes first, large areas mildly preferred
        weight = np.where(present, self.rarity * share**0.25, 0.0)
        chosen: list[int] = []
        for _ in range(n):
            negative = rng.random() < self.negative_rate
            pool = absent.astype(float) if negative and absent.any() else weight
            if not pool.any():
                pool = (share > 0).astype(float) if (share > 0).any() else np.ones_like(share)
            fresh = pool.copy()
            fresh[chosen] = 0.0
            pool = fresh if fresh.any() else pool
            chosen.append(int(rng.choice(len(pool), p=pool / pool.sum())))
        return np.asarray(chosen, np.int32)


def rarity(shares: np.ndarray) -> np.ndarray:
    """1 / sqrt(frequency) from pixel shares [tiles, classes], scaled to a mean of 1."""
    weight = 1.0 / np.sqrt(np.maximum(shares.mean(axis=0), 1e-5))
    return weight / weight.mean()
