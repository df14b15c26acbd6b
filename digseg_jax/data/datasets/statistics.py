# SPDX-License-Identifier: Apache-2.0
"""Statistics of a training split's labels: pixels per class, images per class, co-occurrence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

SAMPLE = 200  # number of examples counted for a split whose statistics were not prepared


@dataclasses.dataclass
class ClassStatistics:
    """Counts of pixels and examples by class; counts of two sets of examples can be added."""

    pixels: np.ndarray  # int64 [c]
    together: np.ndarray  # int64 [c, c]: examples showing both classes; diagonal: showing the class
    examples: int = 0
    ignored: int = 0  # pixels of no class; 0 in shards that were prepared before it was counted

    @classmethod
    def empty(cls, num_classes: int) -> ClassStatistics:
        """Statistics of no examples."""
        shape = (num_classes, num_classes)
        return cls(np.zeros(num_classes, np.int64), np.zeros(shape, np.int64))

    @property
    def num_classes(self) -> int:
        """Number of classes, c."""
        return len(self.pixels)

    def add(self, label: np.ndarray) -> None:
        """Counts one label map, int [h, w] with ignore = -1."""
        # Shifted by one, so that ignored pixels fall into a bin of their own, the first.
        counts = np.bincount(label.ravel() + 1, minlength=self.num_classes + 1)
        self.ignored += int(counts[0])
        counts = counts[1:]

        shown = np.flatnonzero(counts)
        self.pixels += counts
        self.together[np.ix_(shown, shown)] += 1
        self.examples += 1

    def merge(self, other: ClassStatistics) -> None:
        """Adds the counts of other examples."""
        self.pixels += other.pixels
        self.together += other.together
        self.examples += other.examples
        self.ignored += other.ignored

    def rarity(self) -> np.ndarray:
        """1 / sqrt(pixel frequency), scaled to a mean of 1: float [c]."""
        share = self.pixels / max(1, self.pixels.sum())  # of all labeled pixels
        weight = 1.0 / np.sqrt(np.maximum(share, 1e-5))  # at most 316, before scaling
        return weight / weight.mean()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, sparse: 847 classes have 717,409 pairs, few of which occur."""
        # The table is symmetric: its upper triangle is enough.
        rows, columns = np.nonzero(np.triu(self.together))
        counts = self.together[rows, columns]
        return {
            "examples": self.examples,
            "ignored": self.ignored,
            "pixels": self.pixels.tolist(),
            "together": [rows.tolist(), columns.tolist(), counts.tolist()],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClassStatistics:
        """Statistics from the form of `to_dict`."""
        pixels = np.asarray(values["pixels"], np.int64)
        together = np.zeros((len(pixels), len(pixels)), np.int64)
        rows, columns, counts = (np.asarray(v, np.int64) for v in values["together"])

        together[rows, columns] = counts
        together[columns, rows] = counts
        return cls(pixels, together, int(values["examples"]), int(values.get("ignored", 0)))


def class_shares(source: Any, num_classes: int) -> np.ndarray:
    """Share of each class in the labels of each example: float [examples, classes].

    Every label is read, unless the source has a method of that name that knows the shares.
    """
    if hasattr(source, "class_shares"):
        return source.class_shares()

    rows = []
    for i in range(len(source)):
        label = source[i]["label"]
        rows.append(np.bincount(label.ravel() + 1, minlength=num_classes + 1)[1:] / label.size)
    return np.stack(rows)


def repeat_factors(shares: np.ndarray, threshold: float) -> np.ndarray:
    """How often each example enters an epoch: max over its classes of sqrt(threshold / frequency).

    Frequency is the share of examples that show more than 0.5 % of the class (the rule of LVIS,
    arXiv 1908.03195, section 4.1, rounded to whole repeats; at most 4). threshold 0 repeats none.

    Args:
      shares: float [examples, classes], as `class_shares` gives them.
    """
    shows = shares > 0.005
    frequency = shows.mean(axis=0)
    factor = np.sqrt(threshold / np.maximum(frequency, 1e-6))

    # The rarest class of an example decides.
    per_example = np.where(shows, factor[None], 1.0).max(axis=1)
    return np.clip(np.rint(per_example), 1, 4).astype(int)


def sampled(source: Any, num_classes: int, sample: int = SAMPLE) -> ClassStatistics:
    """Statistics of at most `sample` evenly spread examples: the same choice in every process."""
    statistics = ClassStatistics.empty(num_classes)

    # Evenly spread: files often lie in the order of scenes or cities.
    n = len(source)
    for i in sorted({k * n // sample for k in range(sample)} if n > sample else range(n)):
        statistics.add(source[i]["label"])
    return statistics


def name_similarity(names: Sequence[Sequence[str]]) -> np.ndarray:
    """Similarity of classes by shared words of names and synonyms (Jaccard): float [c, c], diagonal 0.

    All words count alike, although the last word of a name says most about the thing
    ("traffic light", "light").
    """
    words = [{_stem(w) for name in own for w in name.lower().split()} for own in names]
    column = {w: i for i, w in enumerate(sorted(set().union(*words)))}

    # Bags of words as rows [c, words]: shared words are a matrix product.
    shows = np.zeros((len(names), len(column)), np.float32)
    for row, own in enumerate(words):
        shows[row, [column[w] for w in own]] = 1

    # Jaccard: |A and B| / |A or B|.
    both = shows @ shows.T
    sizes = shows.sum(axis=1)
    similarity = both / np.maximum(sizes[:, None] + sizes[None] - both, 1)
    np.fill_diagonal(similarity, 0)
    return similarity


def _stem(word: str) -> str:
    """A word without punctuation and without the s of a plural."""
    word = word.strip(",.;:()-")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def confusable(statistics: ClassStatistics, names: Sequence[Sequence[str]]) -> np.ndarray:
    """How strongly class a (column) is expected where class p (row) is seen: float [c, c].

    The share of p's images that show a, plus the similarity of their names; 0 on the diagonal.
    """
    shows = np.diag(statistics.together)  # examples that show each class
    given = statistics.together / np.maximum(shows[:, None], 1)
    np.fill_diagonal(given, 0)
    return given + name_similarity(names)
