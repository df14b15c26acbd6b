# SPDX-License-Identifier: Apache-2.0
"""Scores from the counts of all images: of a label map, of one foreground class, of nested regions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Int
from digseg_jax.evaluation.counts import DEFAULT_THRESHOLD, covers_matrix
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.journal import unpack
from digseg_jax.metrics import binary, boundary
from digseg_jax.metrics import confusion as metrics
from digseg_jax.metrics import presence as open_vocab
from digseg_jax.metrics.health import mask_health

# absent-class rule -> the classes that mIoU averages over, in words for results.json
COUNTED = {
    "mmseg": "classes that occur or are predicted",
    "detectron2": "classes that occur",
    "official": "all classes",
}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Counts of all images of a split under one protocol, from which every score is computed.

    rows: one row per image (`counts.count_image`), with "seconds". absent_rule: rule for classes that
    the labels never show, a key of COUNTED.
    """

    examples: EvalExamples
    protocol: str
    rows: tuple[dict[str, Any], ...]
    absent_rule: str = "mmseg"

    @property
    def confusion(self) -> Int[np.ndarray, "c c+1"]:
        """Pixels by true and predicted class; the last column counts pixels without a prediction."""
        return np.sum([unpack(row["confusion"]) for row in self.rows], axis=0)

    @property
    def overlaps(self) -> Int[np.ndarray, "n q c"]:
        """Pixels of true class c inside the mask of query q alone, for each image n."""
        return np.stack([unpack(row["overlap"]) for row in self.rows])

    @property
    def areas(self) -> Int[np.ndarray, "n c"]:
        """Labeled pixels of each class, for each image n."""
        return np.stack([unpack(row["area"]) for row in self.rows])

    @property
    def miou(self) -> float:
        """Mean IoU of the label map, 0..1."""
        return metrics.mean_iou(self.confusion, self.absent_rule)

    @property
    def seconds(self) -> float:
        """Seconds of sampling and mask decoding, without compilation."""
        return sum(row["seconds"] for row in self.rows)

    def speed(self) -> dict[str, float]:
        """Images and queries per second."""
        seconds = max(self.seconds, 1e-9)
        queries = sum(row["queries"] for row in self.rows)
        return {
            "images_per_second": len(self.rows) / seconds,
            "queries_per_second": queries / seconds,
        }

    def per_class(self) -> dict[str, float | None]:
        """IoU (0..1) by class name; None for a class that neither occurs nor is predicted."""
        iou = metrics.iou_per_class(self.confusion)
        return {name: plain(v) for name, v in zip(self.examples.classes, iou, strict=True)}

    def label_map(self) -> dict[str, float | None]:
        """mIoU, pixel accuracy, mean accuracy and frequency-weighted IoU, 0..1."""
        scores = metrics.closed_set_scores(self.confusion, self.absent_rule)
        return {name: plain(value) for name, value in scores.items()}

    def boundary_iou(self) -> float | None:
        """Boundary IoU of the label map, 0..1; None if no class has a boundary."""
        counts = np.sum([unpack(row["boundary"]) for row in self.rows], axis=0)
        return plain(boundary.boundary_iou(counts))

    def single_queries(self) -> dict[str, float | None]:
        """Scores (0..1) of each query's mask by itself, without competition from the other queries."""
        covers = covers_matrix(self.examples)
        scores = metrics.query_scores(self.overlaps, self.areas, covers)
        return {name: plain(value) for name, value in scores.items()}

    def health(self) -> dict[str, float]:
        """Signs of collapsed masks (see `metrics.health`), as shares (0..1)."""
        return mask_health(self.overlaps, self.areas, covers_matrix(self.examples))

    def gate_recall(self) -> dict[int, dict[str, float]] | None:
        """Share of the present classes that a gate of each size keeps; None if nothing was gated."""
        if not self.rows or "presence" not in self.rows[0]:
            return None
        asked = list(self.examples.asked)  # a gate chooses among these
        presence = np.array([row["presence"] for row in self.rows])[:, asked]
        limits = open_vocab.recall_limits(len(asked))
        return open_vocab.gate_recall(presence, self.areas[:, asked], limits)

    def _occurring(self) -> dict[str, float]:
        """IoU (0..1) of the classes that were asked for and that a label shows, by name."""
        shown, iou = self.areas.sum(axis=0) > 0, metrics.iou_per_class(self.confusion)
        return {self.examples.classes[c]: float(iou[c]) for c in self.examples.asked if shown[c]}

    @property
    def of_an_image(self) -> float:
        """The score by which a gallery ranks a single image, 0..1, by the data set's rule.

        nan if it has no labels. The rule "official" also counts classes that no label shows, as most
        are in a single image: there "mmseg" stands for it.
        """
        if self.examples.metric == "asked":
            return _mean(self._occurring())
        rule = "mmseg" if self.absent_rule == "official" else self.absent_rule
        return metrics.mean_iou(self.confusion, rule)

    def own_metric(self, searching: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Scores of the data set's own metric, beside those of a label map; empty for most data sets.

        searching: counts of training images, for the threshold of a foreground class; () for none.
        """
        if self.examples.metric == "foreground":
            return _foreground(self, searching)
        if self.examples.metric == "asked":
            known = self._occurring()
            return {
                "asked_miou": plain(_mean(known)),
                "scored": len(known),
                "scored_classes": list(known),
            }
        if self.examples.metric == "region_dice":
            return binary.mean_scores([row["regions"] for row in self.rows])
        return {}


def _foreground(scores: Scores, searching: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """IoU, precision, recall, F1 of the last class at 0.5, and at a threshold found on other images."""
    counts = np.array([row["foreground"] for row in scores.rows])  # [images, thresholds, ...]
    grid = list(binary.THRESHOLDS)
    at_half = binary.foreground_scores(counts[:, grid.index(DEFAULT_THRESHOLD)])
    result: dict[str, Any] = {"threshold": DEFAULT_THRESHOLD, **at_half}

    # The threshold is found on the training split; `search_threshold` raises for the scored split.
    if searching:
        split = searching[0]["split"]
        found = binary.search_threshold(
            np.array([row["foreground"] for row in searching]), split, scores.examples.split
        )
        searched = binary.foreground_scores(counts[:, grid.index(found)])
        result["searched"] = {"threshold": found, "split": split, **searched}
    return result


def _mean(values: Mapping[str, float]) -> float:
    """Mean of the values; nan without any."""
    return float(np.mean(list(values.values()))) if values else math.nan


def plain(value: float) -> float | None:
    """The value as a JSON number; None for nan, which JSON lacks."""
    return None if math.isnan(value) else float(value)
