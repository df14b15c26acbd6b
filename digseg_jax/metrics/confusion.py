# SPDX-License-Identifier: Apache-2.0
"""Integer counts of pixels by true and predicted class, and the scores computed from them."""

from __future__ import annotations

import numpy as np

from digseg_jax.arraytypes import Bool, Float, Int

# Share of an image's pixels; a class with fewer (but not none) is neither present nor absent.
LEAST_SHARE = 0.01
ABSENT_RULES = ("mmseg", "detectron2", "official")


def confusion(
    label: Int[np.ndarray, "*n h w"], prediction: Int[np.ndarray, "*n h w"], num_classes: int
) -> Int[np.ndarray, "c c+1"]:
    """Counts pixels by (true class, predicted class), int64; the last column is "no class" (-1).

    Pixels labeled -1 (ignore) are not counted.

    Raises:
      ValueError: label and prediction differ in shape: a score at another resolution is another score.
    """
    label, prediction = np.asarray(label), np.asarray(prediction)
    if label.shape != prediction.shape:
        raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape")

    # One number for each pair of classes, so that one `bincount` counts them all.
    columns, valid = num_classes + 1, label >= 0
    predicted = np.where(prediction < 0, num_classes, prediction)[valid]
    cells = label[valid].astype(np.int64) * columns + predicted
    return np.bincount(cells, minlength=num_classes * columns).reshape(num_classes, columns)


def overlap(
    label: Int[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"], num_classes: int
) -> Int[np.ndarray, " c"]:
    """Counts the pixels of a query's mask by true class, int64; ignored pixels are not counted."""
    return np.bincount(label[mask & (label >= 0)], minlength=num_classes)


def iou_per_class(counts: np.ndarray) -> np.ndarray:
    """IoU from confusion counts [c, c + 1]; nan where a class neither occurs nor is predicted."""
    hit, true, predicted = _marginals(counts)
    return _ratio(hit, true + predicted - hit)


def mean_iou(counts: np.ndarray, rule: str = "mmseg") -> float:
    """Mean IoU over classes; nan if no class counts.

    Args:
      counts: confusion counts [c, c + 1].
      rule: how a class that no label shows enters the mean:
        mmseg: as 0 if it is predicted anywhere, else not at all (mmsegmentation's IoUMetric;
          cityscapesScripts and torchmetrics agree).
        detectron2: not at all (SemSegEvaluator since July 2022; scalabel and the COCO-Stuff script
          agree). Unlike there, "no class" pixels stay errors: dropping them would reward abstaining.
        official: as 0 in any case (sceneparsing, the ADE20K challenge's script).

    Raises:
      ValueError: another rule.
    """
    # The official rule counts classes without any pixel, whose IoU is nan, as 0.
    iou = iou_per_class(counts)
    return _mean(iou[counted_classes(counts, rule)], zero_if_nan=rule == "official")


def counted_classes(counts: np.ndarray, rule: str) -> np.ndarray:
    """Marks the classes that `mean_iou` averages over, bool [c].

    Raises:
      ValueError: unknown rule.
    """
    _, true, predicted = _marginals(counts)
    if rule == "mmseg":
        return (true > 0) | (predicted > 0)
    if rule == "detectron2":
        return true > 0
    if rule == "official":
        return np.ones(len(true), bool)
    raise ValueError(f"absent-class rule {rule!r}; legal: {', '.join(ABSENT_RULES)}")


def pixel_accuracy(counts: np.ndarray) -> float:
    """Share of counted pixels with the right class; "no class" is wrong. nan if none is counted."""
    counts = np.asarray(counts, np.int64)
    return _share(np.diag(counts[:, :-1]).sum(), counts.sum())


def mean_accuracy(counts: np.ndarray) -> float:
    """Mean recall of the classes that occur (mAcc); nan if none does."""
    hit, true, _ = _marginals(counts)
    return _mean(_ratio(hit, true))


def frequency_weighted_iou(counts: np.ndarray) -> float:
    """IoU weighted by the true pixels of each class (fwIoU); nan if nothing is counted."""
    hit, true, predicted = _marginals(counts)
    if not true.sum():
        return float("nan")
    iou = np.nan_to_num(_ratio(hit, true + predicted - hit))
    return float((iou * true).sum() / true.sum())


def closed_set_scores(counts: np.ndarray, rule: str = "mmseg") -> dict[str, float]:
    """Computes every closed-set score of confusion counts [c, c + 1]; values in 0..1."""
    return {
        "miou": mean_iou(counts, rule),
        "accuracy": pixel_accuracy(counts),
        "mean_accuracy": mean_accuracy(counts),
        "fwiou": frequency_weighted_iou(counts),
    }


def _marginals(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TP, true pixels and predicted pixels of each class; int64 [c] each."""
    counts = np.asarray(counts, np.int64)
    if counts.ndim != 2 or counts.shape[1] != counts.shape[0] + 1:
        raise ValueError(f"confusion counts have shape {counts.shape}; expected [c, c + 1]")
    return np.diag(counts[:, :-1]), counts.sum(axis=1), counts[:, :-1].sum(axis=0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; nan where the whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _share(part: np.int64, whole: np.int64) -> float:
    """part / whole; nan, without a warning, if the whole is 0."""
    return float(part / whole) if whole else float("nan")


def _mean(values: np.ndarray, zero_if_nan: bool = False) -> float:
    """Mean of the defined values; nan, without a warning, if there are none."""
    values = np.nan_to_num(values) if zero_if_nan else values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def query_scores(
    overlaps: Int[np.ndarray, "n q c"],
    areas: Int[np.ndarray, "n c"],
    covers: Bool[np.ndarray, "c c"] | None = None,
) -> dict[str, float]:
    """Scores how well masks follow their text, each query's mask by itself, without argmax.

    Args:
      overlaps: pixels of each query's mask by true class, for each image; query i asks for class i. A
        class that was not asked for, as a gate leaves it out, has an empty mask, and counts as such.
      areas: true pixels of each class, for each image.
      covers: [i, j] is True if the pixels of class j belong to the mask of class i; None: each mask
        covers its own class.

    Returns:
      matching_iou: mean over classes of the pooled IoU of a present class with its own query;
      wrong_query_iou: the same with the queries of the other present classes;
      absent_rate: share of pixels that masks of absent classes cover. All are in 0..1, or nan where
      there is nothing to measure.
    """
    # [n, q] and [n, 1]; taken before classes are joined to regions, which would count pixels twice.
    covered, pixels = overlaps.sum(axis=2), areas.sum(axis=1, keepdims=True)
    overlaps, areas = by_region(overlaps, areas, covers)

    # A few pixels at a border do not make a class present, but it is not absent either.
    present = areas > LEAST_SHARE * pixels
    absent = areas == 0
    classes = range(areas.shape[1])

    def pooled(query: int, true: int) -> tuple[np.int64, np.int64]:
        """Intersection and union of a query's masks with a class, over images that show both."""
        both = present[:, query] & present[:, true]
        hit = overlaps[both, query, true].sum()
        return hit, covered[both, query].sum() + areas[both, true].sum() - hit

    # Each class with its own query, then with the queries of all others.
    matching = [pooled(c, c) for c in classes]
    wrong = [np.sum([pooled(q, c) for q in classes if q != c], axis=0) for c in classes]

    return {
        "matching_iou": _mean_ratio(matching),
        "wrong_query_iou": _mean_ratio(wrong),
        "absent_rate": _share(covered[absent].sum(), (absent * pixels).sum()),
    }


def query_iou(
    overlaps: Int[np.ndarray, "n q c"],
    areas: Int[np.ndarray, "n c"],
    covers: Bool[np.ndarray, "c c"] | None = None,
) -> Float[np.ndarray, " q"]:
    """Pooled IoU of each query's mask with its class over all images; nan where both are empty.

    The arguments are those of `query_scores`.
    """
    covered = overlaps.sum(axis=(0, 2))
    overlaps, areas = by_region(overlaps, areas, covers)

    # Query i on class i, summed over images.
    hit = np.einsum("nqq->q", overlaps)
    union = covered + areas.sum(axis=0) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def by_region(
    overlaps: np.ndarray, areas: np.ndarray, covers: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Converts counts by class to counts by the region of each class's mask (`query_scores`)."""
    if covers is None:
        return overlaps, areas

    # A region's pixels are the sum over the classes in it.
    return overlaps @ covers.T.astype(np.int64), areas @ covers.T.astype(np.int64)


def _mean_ratio(pairs: list) -> float:
    """Mean of intersection / union over the pairs with a union; nan without any."""
    ratios = [hit / union for hit, union in pairs if union > 0]
    return float(np.mean(ratios)) if ratios else float("nan")
