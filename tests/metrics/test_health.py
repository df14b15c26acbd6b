# SPDX-License-Identifier: Apache-2.0
"""Signs of collapse, on masks whose state is known."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.metrics.health import mask_health

LABEL = np.array([[0] * 10, [0] * 10, [1] * 10, [1] * 10])  # of four classes, two are shown


def counts(masks, classes=4):
    """Overlaps [1, q, c] and areas [1, c] of boolean masks [q, h, w] on LABEL."""
    overlaps = [[(m & (c == LABEL)).sum() for c in range(classes)] for m in masks]
    return np.array([overlaps]), np.bincount(LABEL.ravel(), minlength=classes)[None]


def masks(*filled):
    found = np.zeros((4, *LABEL.shape), bool)
    for query, mask in filled:
        found[query] = mask
    return found


def test_perfect_masks_are_healthy():
    health = mask_health(*counts(masks((0, LABEL == 0), (1, LABEL == 1))))
    assert health == {"empty_rate": 0.0, "present_dice": 1.0, "absent_area": 0.0}


def test_empty_masks_are_counted_where_the_class_is_there():
    health = mask_health(*counts(masks((0, LABEL == 0))))
    assert health == {"empty_rate": 0.5, "present_dice": 0.5, "absent_area": 0.0}
    assert mask_health(*counts(masks()))["empty_rate"] == 1.0


def test_a_mask_of_what_is_not_there_is_area():
    everywhere = np.ones_like(LABEL, bool)
    health = mask_health(*counts(masks((0, everywhere), (1, LABEL == 1), (2, everywhere))))
    assert health["absent_area"] == pytest.approx(0.5)  # one of two absent classes is everywhere
    assert health["present_dice"] == pytest.approx((2 * 20 / 60 + 1) / 2)


def test_nested_classes_are_judged_by_their_region():
    covers = np.eye(4, dtype=bool)
    covers[0, 1] = True  # class 0 contains class 1
    overlaps, areas = counts(masks((0, LABEL >= 0), (1, LABEL == 1)))
    assert mask_health(overlaps, areas, covers)["present_dice"] == 1.0


def test_of_nothing_there_is_no_number():
    assert all(
        np.isnan(v) for v in mask_health(np.zeros((1, 2, 2), int), np.zeros((1, 2), int)).values()
    )


def test_scores_are_means_over_images_and_classes():
    one, other = counts(masks((0, LABEL == 0), (1, LABEL == 1))), counts(masks())
    both = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    assert mask_health(*both) == {"empty_rate": 0.5, "present_dice": 0.5, "absent_area": 0.0}
