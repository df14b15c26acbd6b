# SPDX-License-Identifier: Apache-2.0
"""Counts that one image contributes to its data set's scores: integers that add up over images.

Masks are read one class at a time, at the label's resolution, and dropped before the next one, so
memory is a few planes of the image's size however large the vocabulary is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Int
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.journal import pack
from digseg_jax.metrics import binary, boundary, confusion
from digseg_jax.prediction.answer import Answer

DEFAULT_THRESHOLD = 0.5  # probability above which a pixel belongs to a mask judged without the others


@dataclasses.dataclass(frozen=True)
class Counted:
    """Counts of one image, JSON-ready, and the masks that a gallery shows.

    row: counts by name; arrays are packed (`journal.pack`). prediction: class per pixel, -1 for none.
    masks: class -> probabilities, float16 [h, w], for the classes that the label shows.
    """

    row: dict[str, Any]
    prediction: Int[np.ndarray, "h w"]
    masks: dict[int, np.ndarray]


def count_image(
    examples: EvalExamples,
    label: Int[np.ndarray, "h w"],
    answer: Answer,
    asked: Sequence[int],
    *,
    keep_masks: bool = False,
) -> Counted:
    """Counts an answer against the label, by the metric of the data set.

    A pixel's class is the most probable one of those that were asked for, or `EvalExamples.rest` where
    none is more probable than not. A class that covers others
    (`EvalExamples.covers`: the optic disc contains the cup) wins a pixel only where none of these does.

    Args:
      label: class ids [h, w], -1 for ignored pixels.
      answer: masks of the queries, at the label's resolution.
      asked: the class that each query of the answer stands for.
      keep_masks: keep the masks of the classes that the label shows, for the gallery.

    Raises:
      ValueError: the answer differs from the label in size.
    """
    classes = len(examples.classes)

    # Running argmax over classes: the best probability so far and the class that it belongs to.
    best = np.full(label.shape, -np.inf, np.float32)
    prediction = np.full(label.shape, -1, np.int32)
    overlaps = np.zeros((classes, classes), np.int64)
    inner: dict[int, np.ndarray] = {}  # masks of classes that others cover
    masks: dict[int, np.ndarray] = {}
    extra = _OwnMetric(examples, label)

    # Visit the covered classes first: their masks are subtracted from the covering class's mask.
    for query in sorted(range(len(asked)), key=lambda q: len(examples.covers[asked[q]])):
        c = asked[query]
        probability = answer.probability(query)
        if probability.shape != label.shape:
            raise ValueError(f"mask {probability.shape} and label {label.shape} differ in shape")

        # A single mask is judged without bias: biases only rank queries against each other.
        alone = answer.alone(query) if answer.biased else probability
        overlaps[c] = confusion.overlap(label, alone > DEFAULT_THRESHOLD, classes)
        extra.see(c, alone)

        # The gallery shows masks of the classes in the label only.
        if keep_masks and (label == c).any():
            masks[c] = probability.astype(np.float16)

        # Remove what the covered classes claim: cup pixels are not pixels of the disc's rim.
        own = probability
        for other in examples.covers[c]:
            if other != c and other in inner:
                own = np.minimum(own, 1.0 - inner[other])

        # Keep the mask only if a later class covers this one.
        if any(c in covered for k, covered in enumerate(examples.covers) if k != c):
            inner[c] = probability

        # Ties go to the class visited first.
        wins = own > best
        prediction[wins] = c
        best[wins] = own[wins]

    # What no class claims belongs to the rest, where there is one.
    if examples.rest >= 0:
        prediction[best <= DEFAULT_THRESHOLD] = examples.rest

    # Integer counts, sparse and JSON-ready; their sums over images give the scores of the split.
    row = {
        "confusion": pack(confusion.confusion(label, prediction, classes)),
        "overlap": pack(overlaps),
        "area": pack(np.bincount(label[label >= 0], minlength=classes)),
        "boundary": pack(boundary.boundary_counts(label, prediction, classes)),
        "queries": len(asked),
    } | extra.row()
    return Counted(row, prediction, masks)


def count_foreground(
    examples: EvalExamples, label: Int[np.ndarray, "h w"], answer: Answer
) -> dict[str, Any]:
    """Counts for a threshold search; the answer's last query must ask for the last class."""
    own = _OwnMetric(examples, label)
    own.see(len(examples.classes) - 1, answer.alone(answer.num_queries - 1))
    return own.row()


class _OwnMetric:
    """Counts of the data set's own metric (`DatasetSpec.metric`), in addition to a label map's."""

    def __init__(self, examples: EvalExamples, label: np.ndarray):
        self.examples, self.label = examples, label
        self._foreground: np.ndarray | None = None
        self._regions: dict[int, np.ndarray] = {}

    def see(self, c: int, mask: np.ndarray) -> None:
        """Takes the probabilities [h, w] of class `c`."""
        # The foreground is the last class: hits and misses at each of `binary.THRESHOLDS`, over labeled
        # pixels only.
        if self.examples.metric == "foreground" and c == len(self.examples.classes) - 1:
            truth = np.isin(self.label, self.examples.covers[c])
            self._foreground = binary.threshold_counts(mask, truth, valid=self.label >= 0)

        # Regions are compared when both are known.
        if self.examples.metric == "region_dice" and c in nested_classes(self.examples):
            self._regions[c] = mask > DEFAULT_THRESHOLD

    def row(self) -> dict[str, Any]:
        """Entries for the image's row; empty if the metric needs none.

        What a gate did not ask for was judged absent: its mask is empty.
        """
        if self.examples.metric == "foreground":
            if self._foreground is None:
                self.see(len(self.examples.classes) - 1, np.zeros(self.label.shape, np.float32))
            assert self._foreground is not None  # `see` has counted it
            return {"foreground": self._foreground.tolist()}
        if self.examples.metric != "region_dice":
            return {}

        # Paint the cup over the disc: what remains of the disc is its rim.
        outer, inner = nested_classes(self.examples)
        for c in {outer, inner} - self._regions.keys():
            self._regions[c] = np.zeros(self.label.shape, bool)
        found = np.where(self._regions[outer], outer, -1)
        found[self._regions[inner]] = inner
        return {"regions": binary.cup_and_disc(self.label, found, cup=inner, rim=outer)}


def nested_classes(examples: EvalExamples) -> tuple[int, int]:
    """Ids of the class that covers another one (optic disc), and of the covered class (cup)."""
    outer = next(c for c, covered in enumerate(examples.covers) if len(covered) > 1)
    return outer, next(c for c in examples.covers[outer] if c != outer)


def covers_matrix(examples: EvalExamples) -> np.ndarray:
    """bool [c, c]: entry (i, j) is True if the pixels of class j belong to the mask of class i."""
    matrix = np.zeros((len(examples.classes),) * 2, bool)
    for c, covered in enumerate(examples.covers):
        matrix[c, list(covered)] = True
    return matrix
