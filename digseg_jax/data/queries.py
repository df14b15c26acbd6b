# SPDX-License-Identifier: Apache-2.0
"""Chooses the classes that are queried for a label crop in training."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

# Kinds of queries: the class is in the crop, is not, or is not although it would be expected.
# Or it is one of another data set of the mixture, which the image cannot show.
PRESENT, ABSENT, HARD_ABSENT, FOREIGN = range(4)
NOWHERE = -2  # class id of a foreign query: no pixel of any label has it


@dataclasses.dataclass(frozen=True)
class QuerySampler:
    """Draws query classes for a crop: present ones by rarity and area, and some absent ones.

    Attributes:
      rarity: float [classes], 1 / sqrt(pixel frequency in the training tiles).
      negative_rate: probability that a query is for an absent class (if there is one).
      min_share: a class with a smaller share of the crop is neither present nor absent.
      confusable: float [c, c], how strongly class a (column) is expected beside class p (row).
      hard_rate: share of the absent classes that are drawn by `confusable` rather than evenly.
      members: bool [c, c], the ids (columns) that a class's mask (row) covers where classes are nested.
      askable: bool [c], False for a class that nobody asks for by name; None: all are asked for.
      foreign_rate: share of the negative queries that are for a class of another data set. If an image
        shows all of its own classes, all of them are.
    """

    rarity: np.ndarray
    negative_rate: float
    min_share: float = 0.002
    confusable: np.ndarray | None = None
    hard_rate: float = 0.0
    members: np.ndarray | None = None
    askable: np.ndarray | None = None
    foreign_rate: float = 0.0

    def __call__(self, label: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws class ids, int32 [n]; without repetition while there are enough classes."""
        return self.draw(label, n, rng)[0]

    def draw(
        self, label: np.ndarray, n: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws class ids, int32 [n], and their kinds in this crop (PRESENT, ...), int32 [n].

        The kinds record what was drawn, not what was asked for: a crop that shows
        every class has no negatives of its own. A foreign query has the class id NOWHERE.
        """
        # Shares of all pixels, ignored ones included. Where classes are nested,
        # a class's share includes the classes that it covers.
        share = class_counts(label, len(self.rarity)) / label.size
        if self.members is not None:
            share = self.members @ share
        askable = np.ones(len(share), bool) if self.askable is None else self.askable
        present, absent = (share > self.min_share) & askable, (share == 0) & askable

        # Prefer rare classes, and mildly those of large areas.
        weight = np.where(present, self.rarity * share**0.25, 0.0)
        expected = self._expected(present, absent)

        chosen: list[int] = []
        kinds: list[int] = []
        for _ in range(n):
            negative = rng.random() < self.negative_rate
            if negative and self._is_foreign(absent, rng):
                chosen.append(NOWHERE)
                kinds.append(FOREIGN)
                continue

            # Three pools: absent classes evenly, absent but expected ones, present ones by weight.
            negative = negative and absent.any()
            pool = absent.astype(float) if negative else weight
            hard = negative and expected is not None and rng.random() < self.hard_rate
            if hard:
                pool = expected

            # Nothing to draw from (only classes below min_share or unasked, or only ignored pixels):
            # take any class shown, or any at all.
            if not pool.any():
                shown = (share > 0) & askable
                pool = (shown if shown.any() else askable).astype(float)

            # Repeat a class only when all of the pool have been drawn.
            fresh = pool.copy()
            fresh[[c for c in chosen if c != NOWHERE]] = 0.0
            pool = fresh if fresh.any() else pool
            chosen.append(_draw(pool, rng))
            kinds.append(PRESENT if share[chosen[-1]] else HARD_ABSENT if hard else ABSENT)
        return np.asarray(chosen, np.int32), np.asarray(kinds, np.int32)

    def _is_foreign(self, absent: np.ndarray, rng: np.random.Generator) -> bool:
        """Whether a negative query is for a class of another data set."""
        if not self.foreign_rate:
            return False
        return not absent.any() or rng.random() < self.foreign_rate

    def _expected(self, present: np.ndarray, absent: np.ndarray) -> np.ndarray | None:
        """Weights of the absent classes that one would expect in this crop; None if there are none."""
        if self.confusable is None or not self.hard_rate or not present.any():
            return None
        # expected beside any present class: the strongest link counts
        weight = np.where(absent, self.confusable[present].max(axis=0), 0.0)
        return weight if weight.any() else None


def _draw(weights: np.ndarray, rng: np.random.Generator) -> int:
    """Same draw as rng.choice(len(weights), p=weights / sum), without the time of its checks."""
    cumulative = np.cumsum(weights / weights.sum())
    return int(np.searchsorted(cumulative / cumulative[-1], rng.random(), side="right"))


def class_counts(label: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels per class of a label map with ignore = -1: int64 [c]."""
    # Three ways to the same result, the fastest first; this runs for every crop.
    if label.itemsize == 1 and (counts := _counts_of_few(label, num_classes)) is not None:
        return counts
    if num_classes < 256 and label.size < 2**24:  # float32 counts are exact up to there
        narrow = np.ascontiguousarray(label)  # -1 becomes 255
        narrow = narrow.view(np.uint8) if narrow.itemsize == 1 else narrow.astype(np.uint8)
        counts = cv2.calcHist([narrow], [0], None, [256], [0, 256])
        return counts.ravel()[:num_classes].astype(np.int64)
    return np.bincount(label.ravel() + 1, minlength=num_classes + 1)[1:]


def _counts_of_few(label: np.ndarray, num_classes: int) -> np.ndarray | None:
    """Counts by comparison with each id of a coarse sample, in a third of a histogram's time.

    None if there are many ids, or some that the sample does not show.
    """
    ids = np.unique(label[::8, ::8])
    if len(ids) > 12:
        return None

    # If the counts do not add up, the sample missed an id.
    found = [int(np.count_nonzero(label == i)) for i in ids]
    if sum(found) != label.size:
        return None

    counts = np.zeros(num_classes + 1, np.int64)
    counts[ids] = found  # -1 indexes the last place, which is dropped
    return counts[:-1]
