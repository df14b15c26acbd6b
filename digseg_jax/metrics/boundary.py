# SPDX-License-Identifier: Apache-2.0
"""Boundary IoU (Cheng et al., arXiv 2103.16562): IoU of the bands inside the masks' contours."""

from __future__ import annotations

import cv2
import numpy as np

from digseg_jax.arraytypes import Bool, Int

DILATION_RATIO = 0.02  # of the image's diagonal; the paper's value
_SQUARE = np.ones((3, 3), np.uint8)


def band_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """Width of the band in pixels: a share of the diagonal, at least 1."""
    return max(1, int(round(ratio * float(np.hypot(height, width)))))


def inner_band(mask: Bool[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
    """Selects the pixels of a mask within `width` pixels (chessboard distance) of its outside.

    Everything beyond the image counts as outside, as in the paper's code.
    """
    # A frame of zeros, because OpenCV's erosion alone takes the outside of the image for foreground.
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    kept = cv2.erode(padded, _SQUARE, iterations=width)[1:-1, 1:-1]
    return mask & ~kept.astype(bool)


def boundary_counts(
    label: Int[np.ndarray, "h w"],
    prediction: Int[np.ndarray, "h w"],
    num_classes: int,
    ratio: float = DILATION_RATIO,
) -> Int[np.ndarray, "c 2"]:
    """Counts intersection and union of every class's bands on one image; sum them over images.

    Pixels labeled -1 (ignore) are cut out of both bands; "no class" (-1) predicts none.

    Raises:
      ValueError: the maps differ in shape.
    """
    if label.shape != prediction.shape:
        raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape")

    # Ignored pixels still bound their neighbors: bands are made first and cut afterwards. Only classes
    # that occur can have a band.
    height, width = label.shape
    band, valid = band_width(height, width, ratio), label >= 0
    counts = np.zeros((num_classes, 2), np.int64)
    for c in np.intersect1d(np.union1d(label, prediction), np.arange(num_classes)):
        true = inner_band(label == c, band) & valid
        found = inner_band(prediction == c, band) & valid
        counts[c] = (true & found).sum(), (true | found).sum()
    return counts


def boundary_iou(counts: Int[np.ndarray, "c 2"]) -> float:
    """Averages the IoU over classes that have a band anywhere; nan if there is none."""
    hit, union = np.asarray(counts, np.int64).T
    seen = union > 0
    return float((hit[seen] / union[seen]).mean()) if seen.any() else float("nan")
