# SPDX-License-Identifier: Apache-2.0
"""Captions of images made from their labels: the names of the classes that fill most of a crop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from digseg_jax.config.schema import DataConfig
from digseg_jax.config.templates import fill
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.sources import parts_of, spec_of

MOST_CLASSES = 3  # most classes that a caption names
LEAST_SHARE = 0.08  # share of a crop that a class must take to be named in its caption
MOST_CAPTIONS = 2000  # most captions of a data set: each of them is encoded before training


class Captions:
    """Every caption of a data set: one to three class names in their usual order.

    Of many classes a caption names fewer, so that there are no more than MOST_CAPTIONS.

    Args:
      spec: the data set.
      first: the id of its first caption, after those of a mixture's earlier data sets.
      unasked: classes that a caption names only where a crop shows nothing else, such as a background.
    """

    def __init__(self, spec: DatasetSpec, first: int = 0, unasked: Sequence[str] = ()):
        self.num_classes, self.first = spec.num_classes, first
        left_out = {name.lower() for name in unasked}
        self._asked = np.array([name.lower() not in left_out for name in spec.names])

        # As many names in a caption as the number of captions allows; one name is always possible.
        every = [math.comb(self.num_classes, n) for n in range(1, MOST_CLASSES + 1)]
        fits = [n for n in range(1, MOST_CLASSES + 1) if sum(every[:n]) <= MOST_CAPTIONS]
        self._names = fits[-1] if fits else 1

        # A caption's id is the place of its subset of classes in this order; classes are sorted.
        sizes = range(1, self._names + 1)
        subsets = [itertools.combinations(range(self.num_classes), n) for n in sizes]
        self._ids = {subset: i for i, subset in enumerate(itertools.chain.from_iterable(subsets))}
        self.texts = tuple(
            fill(spec.caption, ", ".join(spec.names[c] for c in subset)) for subset in self._ids
        )

    def id_of(self, label: np.ndarray) -> int:
        """Id of the caption of a label crop, int [h, w], ignore = -1: its largest classes above 8 %."""
        # Shifted by one: ignored pixels are the first bin, which is dropped.
        counts = np.bincount(label.ravel() + 1, minlength=self.num_classes + 1)[1:]
        share = counts / label.size
        if (share[self._asked] > LEAST_SHARE).any():
            share = np.where(self._asked, share, 0.0)

        # The largest class is always named: a caption is never empty.
        largest = np.argsort(-share, kind="stable")[: self._names]
        chosen = (int(c) for c in largest if share[c] > LEAST_SHARE or c == largest[0])
        return self.first + self._ids[tuple(sorted(chosen))]


def captions_of(config: DataConfig) -> list[Captions]:
    """Captions of each data set of the training, their ids numbered consecutively."""
    made: list[Captions] = []
    for part in parts_of(config):
        first = sum(len(captions.texts) for captions in made)
        made.append(Captions(spec_of(part), first, part.unasked))
    return made
