# SPDX-License-Identifier: Apache-2.0
"""Fills polygons by the even-odd rule at pixel centers.

Pixel (row, column) has its center at (y, x) = (row, column), and a center on the border belongs to the
polygon: the rule of skimage.draw.polygon. Other tools fill other pixels (OpenCV's fillPoly about 10 %
more of a nucleus), and a mask of another rule is another ground truth.
"""

from __future__ import annotations

import numpy as np

_CELLS = 2_000_000  # rows times edges that are worked on at a time


def fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Sets the pixels of one polygon in `mask` (bool [h, w]); parts outside are cut off.

    points: float [n, 2] as (x, y) in pixels, n >= 3, closed or not.
    """
    height, width = mask.shape
    x, y = points[:, 0], points[:, 1]
    first, last = max(int(np.ceil(y.min())), 0), min(int(np.floor(y.max())), height - 1)
    if last < first:
        return

    # Where each edge crosses the line through the centers of each row. Half open (<=, not <), so that a
    # vertex on the line counts for one of its two edges only. Some rows at a time: a table of all rows
    # and edges of a large polygon would take gigabytes.
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    slope = np.divide(x2 - x, y2 - y, out=np.zeros_like(x), where=y2 != y)
    step = max(1, _CELLS // len(points))
    for top in range(first, last + 1, step):
        rows = np.arange(top, min(top + step, last + 1))
        crosses = (y[None] <= rows[:, None]) != (y2[None] <= rows[:, None])  # [rows, edges]
        at = np.where(crosses, x[None] + (rows[:, None] - y[None]) * slope[None], np.inf)

        # Even-odd: the inside lies between the 1st and 2nd crossing, the 3rd and 4th, and so on.
        at.sort(axis=1)
        for row, crossing in zip(rows, at, strict=True):
            crossing = crossing[np.isfinite(crossing)]
            for left, right in zip(crossing[::2], crossing[1::2], strict=True):
                _run(mask[row], left, right)

    # The border belongs to the polygon: add horizontal edges through centers, which cross no row ...
    level = (y == y2) & (y == np.round(y)) & (y >= 0) & (y <= height - 1)
    for i in np.flatnonzero(level):
        _run(mask[int(y[i])], min(x[i], x2[i]), max(x[i], x2[i]))

    # ... and vertices on centers.
    corner = (x == np.round(x)) & (y == np.round(y)) & (x >= 0) & (y >= 0)
    for i in np.flatnonzero(corner & (x <= width - 1) & (y <= height - 1)):
        mask[int(y[i]), int(x[i])] = True


def _run(row: np.ndarray, left: float, right: float) -> None:
    """Sets the centers from `left` to `right`, both inclusive, in one row."""
    start, stop = max(int(np.ceil(left)), 0), min(int(np.floor(right)), len(row) - 1)
    if start <= stop:
        row[start : stop + 1] = True
