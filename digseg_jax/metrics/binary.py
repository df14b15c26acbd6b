# SPDX-License-Identifier: Apache-2.0
"""Scores of one foreground class against the rest: roads, nuclei, optic disc and cup.

Published tables pool all images or average over them, so both are always computed, from the same
integer counts TP, FP, FN of each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from digseg_jax.arraytypes import Bool, Float, Int

NAMES = ("iou", "precision", "recall", "f1")
EMPTY_RULES = ("one", "zero", "skip")  # for images without foreground in label and prediction
_Counts = Int[np.ndarray, "..."] | np.int64
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))  # 0.05, 0.1, ..., 0.95


def binary_counts(
    truth: Bool[np.ndarray, "*b h w"],
    prediction: Bool[np.ndarray, "*b h w"],
    valid: Bool[np.ndarray, "*b h w"] | None = None,
) -> Int[np.ndarray, "*b 3"]:
    """Counts TP, FP and FN pixels of each image; pixels that are not `valid` are left out.

    Raises:
      ValueError: the arrays differ in shape.
    """
    truth, prediction = np.asarray(truth, bool), np.asarray(prediction, bool)
    if truth.shape != prediction.shape or (valid is not None and valid.shape != truth.shape):
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")

    # True negatives enter none of the four scores, so they are not counted.
    inside = np.ones_like(truth) if valid is None else np.asarray(valid, bool)
    parts = (truth & prediction, ~truth & prediction, truth & ~prediction)
    return np.stack([(p & inside).sum(axis=(-2, -1)) for p in parts], axis=-1).astype(np.int64)


def pooled(counts: Int[np.ndarray, "n 3"]) -> dict[str, float]:
    """IoU, precision, recall and F1 (the same as Dice) from the sums over all images, in 0..1.

    A quotient 0 / 0 is nan: without any foreground there is nothing to score.
    """
    tp, fp, fn = np.asarray(counts, np.int64).reshape(-1, 3).sum(axis=0)
    return {name: float(v) for name, v in zip(NAMES, _quotients(tp, fp, fn), strict=True)}


def per_image(counts: Int[np.ndarray, "n 3"], empty: str = "one") -> dict[str, float]:
    """Averages the four scores over images; `empty` says how images without foreground count.

    Args:
      counts: TP, FP, FN of each image.
      empty: rule for an image without foreground in label and prediction: "one" scores it 1 (nothing
        was there and nothing was found), "zero" 0, "skip" leaves it out of the mean. The precision of
        an image whose foreground is missed completely, and the recall of one that has only false
        alarms, are 0 under every rule.

    Raises:
      ValueError: another rule.
    """
    if empty not in EMPTY_RULES:
        raise ValueError(f"empty rule {empty!r}; legal: {', '.join(EMPTY_RULES)}")
    tp, fp, fn = np.asarray(counts, np.int64).reshape(-1, 3).T

    # An undefined score has three causes. An empty image follows the rule. Foreground that was missed
    # completely leaves no precision, and false alarms without any foreground leave no recall: these
    # score 0.
    nothing = (tp + fp + fn) == 0
    means = {}
    for name, values in zip(NAMES, _quotients(tp, fp, fn), strict=True):
        values = np.where(nothing, {"one": 1.0, "zero": 0.0, "skip": np.nan}[empty], values)
        values = np.where(~nothing & np.isnan(values), 0.0, values)

        # nan is left only where "skip" put it.
        kept = values[~np.isnan(values)]
        means[name] = float(kept.mean()) if kept.size else float("nan")
    return means


def foreground_scores(counts: Int[np.ndarray, "n 3"], empty: str = "one") -> dict[str, float]:
    """`pooled` and `per_image` side by side, named "iou_pooled", "iou_per_image" and so on."""
    scores = {f"{name}_pooled": value for name, value in pooled(counts).items()}
    return scores | {f"{name}_per_image": v for name, v in per_image(counts, empty).items()}


def threshold_counts(
    probability: Float[np.ndarray, "h w"],
    truth: Bool[np.ndarray, "h w"],
    thresholds: Sequence[float] = THRESHOLDS,
    valid: Bool[np.ndarray, "h w"] | None = None,
) -> Int[np.ndarray, "t 3"]:
    """Counts like `binary_counts` at each threshold, with the mask probability > threshold."""
    return np.stack([binary_counts(truth, probability > t, valid) for t in thresholds])


def search_threshold(
    counts: Int[np.ndarray, "n t 3"],
    split: str,
    scored_split: str,
    thresholds: Sequence[float] = THRESHOLDS,
) -> float:
    """Returns the threshold with the best pooled F1; of equally good ones, the middle one.

    Args:
      counts: TP, FP, FN of each image at each threshold.
      split: the split that `counts` come from.
      scored_split: the split that the threshold will be used on; it must be another one.
      thresholds: the thresholds of `counts`.

    Raises:
      ValueError: the threshold would be fitted on what it scores.
    """
    if split == scored_split:
        raise ValueError(f"threshold search on {split!r}, which is the split that is scored")

    # Pool over images: [t] each.
    tp, fp, fn = np.moveaxis(np.asarray(counts, np.int64).sum(axis=0), -1, 0)
    f1 = np.nan_to_num(_quotients(tp, fp, fn)[3])

    best = np.flatnonzero(f1 == f1.max())
    return float(thresholds[best[len(best) // 2]])


def cup_and_disc(
    label: Int[np.ndarray, "h w"], prediction: Int[np.ndarray, "h w"], cup: int, rim: int
) -> dict[str, float]:
    """REFUGE's scores of one image: Dice of the cup, and of the disc, which contains the cup.

    Source: refuge-evaluation, the challenge's code, which also scores the absolute error of the
    vertical cup-to-disc ratio. Dice of two empty masks is 1 (0 / 0 there); a ratio without a disc is 0.

    Args:
      label, prediction: class indices; `cup` and `rim` name the two classes.
    """
    # The disc is the region inside the rim, so it includes the cup.
    scores = {}
    for name, classes in (("cup", (cup,)), ("disc", (cup, rim))):
        counts = binary_counts(np.isin(label, classes), np.isin(prediction, classes))
        scores[f"{name}_dice"] = per_image(counts[None])["f1"]

    # The clinical measure: how wide the cup is compared with the disc, in label and prediction.
    ratios = [_vertical_ratio(m == cup, np.isin(m, (cup, rim))) for m in (label, prediction)]
    return scores | {"cdr_error": abs(ratios[0] - ratios[1])}


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages dictionaries with the same keys over images; empty for no images."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} if rows else {}


def _vertical_ratio(cup: np.ndarray, disc: np.ndarray) -> float:
    """Vertical diameter of the cup over that of the disc; 0 without a disc.

    A diameter is the largest number of the region's pixels in one column (refuge-evaluation): stray
    pixels far away do not count, and for a tilted ellipse it is less than the extent.
    """
    cup_diameter, disc_diameter = (int(mask.sum(axis=0).max(initial=0)) for mask in (cup, disc))
    return cup_diameter / disc_diameter if disc_diameter else 0.0


def _quotients(tp: _Counts, fp: _Counts, fn: _Counts) -> list[np.ndarray]:
    """IoU, precision, recall, F1; nan where the denominator is 0."""
    pairs = ((tp, tp + fp + fn), (tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn))
    return [np.where(whole > 0, part / np.maximum(whole, 1), np.nan) for part, whole in pairs]
