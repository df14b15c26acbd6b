# SPDX-License-Identifier: Apache-2.0
"""Shares of classes, and how often examples of rare ones are seen."""

from __future__ import annotations

import numpy as np

from digseg_jax.data.datasets.statistics import class_shares, repeat_factors


def test_repeat_factors_repeat_only_examples_of_rare_classes():
    shares = np.zeros((100, 2))
    shares[:, 0], shares[:4, 1] = 1.0, 0.3
    repeats = repeat_factors(shares, 0.36)  # sqrt(0.36 / 0.04) = 3
    np.testing.assert_array_equal(repeats, [3] * 4 + [1] * 96)
    np.testing.assert_array_equal(repeat_factors(shares, 0.0), 1)
    assert repeat_factors(shares, 1e6).max() == 4


def test_shares_are_counted_from_the_labels_unless_the_source_knows_them():
    labels = [np.array([[0, 0, 1, -1]]), np.array([[2, 2, 2, 2]])]
    counted = class_shares([{"label": label} for label in labels], 3)
    np.testing.assert_array_equal(counted, [[0.5, 0.25, 0.0], [0.0, 0.0, 1.0]])

    class Knows:
        def class_shares(self):
            return counted + 1.0

    np.testing.assert_array_equal(class_shares(Knows(), 3), counted + 1.0)
