# SPDX-License-Identifier: Apache-2.0
"""Integer counts on the device, and the scores that are made of them on the host."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Bool, Float, Int


def confusion(
    label: Int[Array, "n h w"], prediction: Int[Array, "n h w"], num_classes: int
) -> Int[Array, "c c+1"]:
    """Pixel counts by (true class, predicted class); the last column is "no class" (-1).

    Pixels labelled -1 (ignore) are not counted. int32: enough for 2**31 pixels a call.
    """
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
    counts = np.asarray(counts, np.int64)
    hit = np.diag(counts[:, :-1])
    union = counts.sum(axis=1) + counts[:, :-1].sum(axis=0) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def mean_iou(counts: np.ndarray) -> float:
    """Mean over classes that occur or are predicted (mmsegmentation's rule: nanmean)."""
    return float(np.nanmean(iou_per_class(counts)))


def pixel_accuracy(counts: np.ndarray) -> float:
    """Share of counted pixels with the right class; "no class" is wrong."""
    counts = np.asarray(counts, np.int64)
    return float(np.diag(counts[:, :-1]).sum() / max(counts.sum(), 1))


def query_scores(overlaps: np.ndarray, areas: np.ndarray, pixels: int) -> dict[str, float]:
    """How well masks follow their text; no argmax, each query's mask alone.

    Args:
      overlaps: [images, q, c] from `overlap`, query i asking for class i.
      areas: [images, c] true pixels per class.
      pixels: counted pixels per image.

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
        "absent_rate": float(covered[absent].sum() / max(absent.sum() * pixels, 1)),
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
