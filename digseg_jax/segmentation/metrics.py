# SPDX-License-Identifier: Apache-2.0
"""Integer counts on the device, and the scores that are made of them on the host."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Bool, Float, Int

ABSENT_RULES = ("mmseg", "detectron2", "official")


def confusion(
    label: Int[Array, "n h w"], prediction: Int[Array, "n h w"], num_classes: int
) -> Int[Array, "c c+1"]:
    """Pixel counts by (true class, predicted class); the last column is "no class" (-1).

    Pixels labelled -1 (ignore) are not counted. int32: enough for 2**31 pixels a call; add calls up
    in int64 on the host.

    Raises:
      ValueError: label and prediction differ in shape: a score at another resolution is another score.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape")
    columns = num_classes + 1
    predicted = jnp.where(prediction < 0, num_classes, prediction)
    cell = jnp.where(label < 0, num_classes * columns, label * columns + predicted)
    counts = jnp.bincount(cell.ravel(), length=num_classes * columns + 1)[:-1]
    return counts.reshape(num_classes, columns).astype(jnp.int32)


def overlap(
    label: Int[Array, "n h w"], masks: Bool[Array, "n q h w"], num_classes: int
) -> Int[Array, "n q c"]:
    """Pixels of each query's mask by true class; ignored pixels belong to none."""
    classes = jnp.arange(num_classes)
    true = (label[:, None] == classes[None, :, None, None]).astype(jnp.float32)
    # float32 counts are exact below 2**24 pixels an image
    counts = jnp.einsum("nqhw,nchw->nqc", masks.astype(jnp.float32), true)
    return counts.astype(jnp.int32)


def iou_per_class(counts: np.ndarray) -> np.ndarray:
    """IoU from confusion counts [c, c + 1]; nan where a class neither occurs nor is predicted."""
    hit, true, predicted = _marginals(counts)
    return _ratio(hit, true + predicted - hit)


def mean_iou(counts: np.ndarray, rule: str = "mmseg") -> float:
    """Mean IoU over classes; `rule` says what a class does that the labels never show.

    mmseg: it counts as 0 if it is predicted anywhere and is left out otherwise (mmsegmentation's
      IoUMetric; cityscapesScripts and torchmetrics agree).
    detectron2: it is left out (SemSegEvaluator since July 2022; scalabel and the COCO-Stuff script
      agree). Unlike detectron2, "no class" pixels stay errors: dropping them would reward abstaining.
    official: it counts as 0 in any case (sceneparsing, the ADE20K challenge's script).

    Returns nan if no class counts. Raises ValueError for another rule.
    """
    iou = iou_per_class(counts)
    return _mean(iou[counted_classes(counts, rule)], zero_if_nan=rule == "official")


def counted_classes(counts: np.ndarray, rule: str) -> np.ndarray:
    """bool [c]: the classes that `mean_iou` averages over under a rule."""
    _, true, predicted = _marginals(counts)
    if rule == "mmseg":
        return (true > 0) | (predicted > 0)
    if rule == "detectron2":
        return true > 0
    if rule == "official":
        return np.ones(len(true), bool)
    raise ValueError(f"absent-class rule {rule!r}; legal: {', '.join(ABSENT_RULES)}")


def pixel_accuracy(counts: np.ndarray) -> float:
    """Share of counted pixels with the right class; "no class" is wrong."""
    counts = np.asarray(counts, np.int64)
    return float(np.diag(counts[:, :-1]).sum() / max(counts.sum(), 1))


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


def dice_per_class(counts: np.ndarray) -> np.ndarray:
    """2 TP / (P + G) of each class, pooled; nan where it neither occurs nor is predicted."""
    hit, true, predicted = _marginals(counts)
    return _ratio(2 * hit, true + predicted)


def closed_set_scores(counts: np.ndarray, rule: str = "mmseg") -> dict[str, float]:
    """Everything that confusion counts [c, c + 1] say about a closed set; values in 0..1."""
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
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray, zero_if_nan: bool = False) -> float:
    """Mean of what is defined; nan, without a warning, if nothing is."""
    values = np.nan_to_num(values) if zero_if_nan else values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def query_scores(overlaps: np.ndarray, areas: np.ndarray, pixels: int | np.ndarray) -> dict[str, float]:
    """How well masks follow their text; no argmax, each query's mask alone.

    Args:
      overlaps: [images, q, c] from `overlap`, query i asking for class i.
      areas: [images, c] true pixels per class.
      pixels: counted pixels per image; one number, or [images, 1].

    Returns:
      matching_iou: mean over classes of the pooled IoU of a present class with its own query;
      wrong_query_iou: the same with the queries of the other present classes;
      absent_rate: share of pixels that queries of absent classes cover.
    """
    overlaps, areas = overlaps.astype(np.int64), areas.astype(np.int64)
    covered = overlaps.sum(axis=2)  # images, q
    present = areas > 0.01 * pixels
    absent = areas == 0
    classes = range(areas.shape[1])

    def pooled(query: int, true: int) -> tuple[int, int]:
        both = present[:, query] & present[:, true]
        hit = overlaps[both, query, true].sum()
        return hit, covered[both, query].sum() + areas[both, true].sum() - hit

    matching = [pooled(c, c) for c in classes]
    wrong = [np.sum([pooled(q, c) for q in classes if q != c], axis=0) for c in classes]
    return {
        "matching_iou": _mean_ratio(matching),
        "wrong_query_iou": _mean_ratio(wrong),
        "absent_rate": float(covered[absent].sum() / max((absent * pixels).sum(), 1)),
    }


def query_iou(overlaps: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Pooled IoU of each query's mask with its class over all images; [q], nan where undefined."""
    hit = np.einsum("nqq->q", overlaps.astype(np.int64))
    union = overlaps.astype(np.int64).sum(axis=(0, 2)) + areas.astype(np.int64).sum(axis=0) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def _mean_ratio(pairs: list) -> float:
    ratios = [hit / union for hit, union in pairs if union > 0]
    return float(np.mean(ratios)) if ratios else float("nan")


def label_map(probability: Float[Array, "n q h w"]) -> Int[Array, "n h w"]:
    """The most probable query of each pixel: a closed set always answers."""
    return jnp.argmax(probability, axis=1).astype(jnp.int32)
