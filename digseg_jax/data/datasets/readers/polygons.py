# SPDX-License-Identifier: Apache-2.0
"""Filling polygons: even-odd rule at pixel centres.

Pixel (row, column) has its centre at (y, x) = (row, column), and a centre on the border belongs to the
polygon: the rule of skimage.draw.polygon. Other tools fill other pixels (OpenCV's fillPoly about 10 %
more of a nucleus), and a mask of another rule is another ground truth.
"""

from __future__ import annotations

import numpy as np


def fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Sets the pixels of one polygon in `mask` (bool [h, w]); parts outside are cut off.

    points: float [n, 2] as (x, y) in pixels, n >= 3, closed or not.
    """
    height, width = mask.shape
    x, y = points[:, 0], points[:, 1]
    first, last = max(int(np.ceil(y.min())), 0), min(int(np.floor(y.max())), height - 1)
    if last < first:
        return
    rows = np.arange(first, last + 1)
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    crosses = (y[None] <= rows[:, None]) != (y2[None] <= rows[:, None])  # [rows, edges]
    slope = np.divide(x2 - x, y2 - y, out=np.zeros_like(x), where=y2 != y)
    at = np.where(crosses, x[None] + (rows[:, None] - y[None]) * slope[None], np.inf)
    at.sort(axis=1)
    for row, crossing in zip(rows, at, strict=True):
        crossing = crossing[np.isfinite(crossing)]
        for left, right in zip(crossing[::2], crossing[1::2], strict=True):
            _run(mask[row], left, right)
    level = (y == y2) & (y == np.round(y)) & (y >= 0) & (y <= height - 1)
    for i in np.flatnonzero(level):  # horizontal edges through centres
        _run(mask[int(y[i])], min(x[i], x2[i]), max(x[i], x2[i]))
    corner = (x == np.round(x)) & (y == np.round(y)) & (x >= 0) & (y >= 0)
    for i in np.flatnonzero(corner & (x <= width - 1) & (y <= height - 1)):
        mask[int(y[i]), int(x[i])] = True


def _run(row: np.ndarray, left: float, right: float) -> None:
    start, stop = max(int(np.ceil(left)), 0), min(int(np.floor(right)), len(row) - 1)
    if start <= stop:
        row[start : stop + 1] = True
