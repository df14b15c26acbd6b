# SPDX-License-Identifier: Apache-2.0
"""What one image contributes to its data set's scores: integers that add up over images.

Masks come one class at a time, at the label's resolution, and are dropped before the next: memory is a
few planes of the image's size, however large the vocabulary.
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

DEFAULT_THRESHOLD = 0.5  # of a probability, where a mask is judged on its own


@dataclasses.dataclass(frozen=True)
class Counted:
    """The counts of an image, JSON-ready, and what a gallery shows of it.

    prediction: int32 [h, w]. masks: probabilities float16 [h, w] of the classes that the label shows.
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

    A pixel's class is the most probable one of those that were asked for. A class that covers others
    (`EvalExamples.covers`: the optic disc contains the cup) counts only where none of them is.

    Args:
      asked: the class that each query of the answer stands for.

    Raises:
      ValueError: the answer is of another size than the label.
    """
    classes = len(examples.classes)
    best = np.full(label.shape, -np.inf, np.float32)
    prediction = np.full(label.shape, -1, np.int32)
    overlaps = np.zeros((classes, classes), np.int64)
    inner: dict[int, np.ndarray] = {}  # masks of classes that others cover
    masks: dict[int, np.ndarray] = {}
    extra = _OwnMetric(examples, label)

    # A class comes after those that it covers.
    for query in sorted(range(len(asked)), key=lambda q: len(examples.covers[asked[q]])):
        c = asked[query]
        probability = answer.probability(query)
        if probability.shape != label.shape:
            raise ValueError(f"mask {probability.shape} and label {label.shape} differ in shape")
        alone = answer.alone(query) if answer.biased else probability
        overlaps[c] = confusion.overlap(label, alone > DEFAULT_THRESHOLD, classes)
        extra.see(c, alone)
        if keep_masks and (label == c).any():
            masks[c] = probability.astype(np.float16)

        # What the covered classes claim is not this one's own.
        own = probability
        for other in examples.covers[c]:
            if other != c and other in inner:
                own = np.minimum(own, 1.0 - inner[other])
        if any(c in covered for k, covered in enumerate(examples.covers) if k != c):
            inner[c] = probability
        wins = own > best
        prediction[wins] = c
        best[wins] = own[wins]

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
    """The counts that a threshold search needs; the answer's last query asks for the last class."""
    own = _OwnMetric(examples, label)
    own.see(len(examples.classes) - 1, answer.alone(answer.num_queries - 1))
    return own.row()


class _OwnMetric:
    """Counts beyond a label map's, where the data set is scored by them (`DatasetSpec.metric`)."""

    def __init__(self, examples: EvalExamples, label: np.ndarray):
        self.examples, self.label = examples, label
        self._foreground: np.ndarray | None = None
        self._regions: dict[int, np.ndarray] = {}

    def see(self, c: int, mask: np.ndarray) -> None:
        """Takes the probabilities [h, w] of a class."""
        if self.examples.metric == "foreground" and c == len(self.examples.classes) - 1:
            truth = np.isin(self.label, self.examples.covers[c])
            self._foreground = binary.threshold_counts(mask, truth, valid=self.label >= 0)
        if self.examples.metric == "region_dice" and c in nested_classes(self.examples):
            self._regions[c] = mask > DEFAULT_THRESHOLD

    def row(self) -> dict[str, Any]:
        """What is written down of it."""
        if self._foreground is not None:
            return {"foreground": self._foreground.tolist()}
        if len(self._regions) < 2:
            return {}
        outer, inner = nested_classes(self.examples)
        found = np.where(self._regions[outer], outer, -1)
        found[self._regions[inner]] = inner
        return {"regions": binary.cup_and_disc(self.label, found, cup=inner, rim=outer)}


def nested_classes(examples: EvalExamples) -> tuple[int, int]:
    """The class that covers another one, and that other."""
    outer = next(c for c, covered in enumerate(examples.covers) if len(covered) > 1)
    return outer, next(c for c in examples.covers[outer] if c != outer)


def covers_matrix(examples: EvalExamples) -> np.ndarray:
    """bool [c, c]: whether the pixels of class j belong to the mask of class i."""
    matrix = np.zeros((len(examples.classes),) * 2, bool)
    for c, covered in enumerate(examples.covers):
        matrix[c, list(covered)] = True
    return matrix
