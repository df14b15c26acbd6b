# SPDX-License-Identifier: Apache-2.0
"""Which classes of a label crop are asked for in training."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

# what a query is in its crop
PRESENT, ABSENT, HARD_ABSENT = range(3)


@dataclasses.dataclass(frozen=True)
class QuerySampler:
    """Draws query classes for a crop: present ones by rarity and area, some absent ones.

    rarity: float [classes], 1 / sqrt(pixel frequency in the training tiles).
    negative_rate: probability that a query is for an absent class (if there is one).
    min_share: a class with a smaller share of the crop is neither present nor absent.
    confusable: float [c, c], how much class a (column) is expected beside class p (row).
    hard_rate: share of the absent classes that are drawn by `confusable` rather than evenly.
    members: bool [c, c], the ids (columns) that a class's mask (row) covers where classes are nested.
    """

    rarity: np.ndarray
    negative_rate: float
    min_share: float = 0.002
    confusable: np.ndarray | None = None
    hard_rate: float = 0.0
    members: np.ndarray | None = None

    def __call__(self, label: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """Returns int32 [n] class ids; without repetition while there are enough classes."""
        return self.draw(label, n, rng)[0]

    def draw(
        self, label: np.ndarray, n: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns class ids and what they are in this crop (PRESENT, ...): int32 [n], int32 [n].

        The kinds are those that were drawn, not those that were asked for: a crop that shows every
        class has no negatives.
        """
        share = class_counts(label, len(self.rarity)) / label.size
        if self.members is not None:
            share = self.members @ share
        present, absent = share > self.min_share, share == 0
        # rare classes first, large areas mildly preferred
        weight = np.where(present, self.rarity * share**0.25, 0.0)
        expected = self._expected(present, absent)
        chosen: list[int] = []
        kinds: list[int] = []
        for _ in range(n):
            negative = rng.random() < self.negative_rate and absent.any()
            pool = absent.astype(float) if negative else weight
            hard = negative and expected is not None and rng.random() < self.hard_rate
            if hard:
                pool = expected
            if not pool.any():
                pool = (share > 0).astype(float) if (share > 0).any() else np.ones_like(share)
            fresh = pool.copy()
            fresh[chosen] = 0.0
            pool = fresh if fresh.any() else pool
            chosen.append(_draw(pool, rng))
            kinds.append(PRESENT if share[chosen[-1]] else HARD_ABSENT if hard else ABSENT)
        return np.asarray(chosen, np.int32), np.asarray(kinds, np.int32)

    def _expected(self, present: np.ndarray, absent: np.ndarray) -> np.ndarray | None:
        """Weights of the absent classes that one would expect in this crop; None: there are none."""
        if not self.hard_rate or not present.any():
            return None
        weight = np.where(absent, self.confusable[present].max(axis=0), 0.0)
        return weight if weight.any() else None


def _draw(weights: np.ndarray, rng: np.random.Generator) -> int:
    """What rng.choice(len(weights), p=weights / sum) gives, without the time of its checks."""
    cumulative = np.cumsum(weights / weights.sum())
    return int(np.searchsorted(cumulative / cumulative[-1], rng.random(), side="right"))


def class_counts(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels per class of a label map with ignore = -1: int64 [c]."""
    if label.itemsize == 1 and (counts := _counts_of_few(label, num_classes)) is not None:
        return counts
    if num_classes < 256 and label.size < 2**24:  # float32 counts are exact up to there
        narrow = np.ascontiguousarray(label)  # -1 becomes 255
        narrow = narrow.view(np.uint8) if narrow.itemsize == 1 else narrow.astype(np.uint8)
        counts = cv2.calcHist([narrow], [0], None, [256], [0, 256])
        return counts.ravel()[:num_classes].astype(np.int64)
    return np.bincount(label.ravel() + 1, minlength=num_classes + 1)[1:]


def _counts_of_few(label: np.ndarray, num_classes: int) -> np.ndarray | None:
    """Counts by comparing with each id of a coarse sample, a third of a histogram's time.

    None: there are many ids, or some that the sample does not show.
    """
    ids = np.unique(label[::8, ::8])
    if len(ids) > 12:
        return None
    found = [int(np.count_nonzero(label == i)) for i in ids]
    if sum(found) != label.size:
        return None
    counts = np.zeros(num_classes + 1, np.int64)
    counts[ids] = found  # -1 is the last one
    return counts[:-1]


def rarity(shares: np.ndarray) -> np.ndarray:
    """1 / sqrt(frequency) from pixel shares [tiles, classes], scaled to a mean of 1."""
    weight = 1.0 / np.sqrt(np.maximum(shares.mean(axis=0), 1e-5))
    return weight / weight.mean()
