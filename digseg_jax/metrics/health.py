# SPDX-License-Identifier: Apache-2.0
"""Signs of collapse: empty masks of present classes, and masks of absent classes that are not empty."""

from __future__ import annotations

import numpy as np

from digseg_jax.arraytypes import Bool, Float, Int
from digseg_jax.metrics.confusion import LEAST_SHARE, by_region


def mask_health(
    overlaps: Int[np.ndarray, "n q c"],
    areas: Int[np.ndarray, "n c"],
    covers: Bool[np.ndarray, "c c"] | None = None,
) -> dict[str, float]:
    """Judges each mask of each image by itself, without argmax.

    A class with at most a hundredth of an image's pixels is neither present nor absent there.

    Args:
      overlaps: pixels of each query's mask by true class; query i asks for class i. A query that was
        not asked has an empty mask.
      areas: true pixels of each class.
      covers: [i, j] is True if the pixels of class j belong to the mask of class i; None: each mask
        covers its own class.

    Returns:
      empty_rate: share of the masks of present classes without a pixel; present_dice: mean of their
      Dice scores; absent_area: mean share of an image that a mask of an absent class covers. nan where
      there is nothing to judge.
    """
    # Before classes are joined to regions, which would count pixels twice.
    covered, pixels = overlaps.sum(axis=2), areas.sum(axis=1, keepdims=True)
    overlaps, areas = by_region(overlaps, areas, covers)

    # An image without labeled pixels is left out: its classes are unknown rather than absent.
    present, absent = areas > LEAST_SHARE * pixels, (areas == 0) & (pixels > 0)

    # Query i on class i: the diagonal of each image's counts.
    hit = np.einsum("nqq->nq", overlaps)
    dice = 2 * hit / np.maximum(covered + areas, 1)
    share = covered / np.maximum(pixels, 1)
    return {
        "empty_rate": _mean((covered == 0)[present]),
        "present_dice": _mean(dice[present]),
        "absent_area": _mean(share[absent]),
    }


def _mean(values: Float[np.ndarray, " k"] | Bool[np.ndarray, " k"]) -> float:
    """Mean of the values; nan, without a warning, if there are none."""
    return float(values.mean()) if values.size else float("nan")
