# SPDX-License-Identifier: Apache-2.0
"""Captions of images made from their labels: the names of the classes that fill most of a crop."""

from __future__ import annotations

import itertools
import math

import numpy as np

from digseg_jax.config.templates import fill
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.errors import UserError

MOST_CLASSES = 3  # most classes that a caption names
LEAST_SHARE = 0.08  # share of a crop that a class must take to be named in its caption
MOST_CAPTIONS = 2000  # most captions of a data set: each of them is encoded before training


class Captions:
    """Every caption of a data set: one to three class names in their usual order.

    Raises:
      UserError: the data set has so many classes that their captions are too many.
    """

    def __init__(self, spec: DatasetSpec):
        self.num_classes = spec.num_classes
        sizes = range(1, MOST_CLASSES + 1)
        if sum(math.comb(self.num_classes, n) for n in sizes) > MOST_CAPTIONS:
            raise UserError(
                f"config.data.name={spec.name!r}: its {self.num_classes} classes make more than "
                f"{MOST_CAPTIONS} captions; config.task='prior' needs a data set of fewer classes"
            )

        # A caption's id is the place of its subset of classes in this order; classes are sorted.
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

        # The largest class is always named: a caption is never empty.
        largest = np.argsort(-share, kind="stable")[:MOST_CLASSES]
        chosen = (int(c) for c in largest if share[c] > LEAST_SHARE or c == largest[0])
        return self._ids[tuple(sorted(chosen))]
