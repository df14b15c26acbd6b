# SPDX-License-Identifier: Apache-2.0
"""The gate: who survives, what it loses, and how label maps name the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.metrics import presence


def test_presence_is_the_mean_of_the_most_certain_percent():
    masks = np.random.default_rng(0).random((3, 20, 30))
    expected = np.sort(masks.reshape(3, -1), axis=1)[:, -6:].mean(axis=1)
    np.testing.assert_allclose(presence.presence(masks), expected)
    assert presence.presence(np.full((2, 1, 1), 0.25)).tolist() == [0.25, 0.25]


def test_the_best_above_the_cut_survive_in_class_order():
    scores = np.array([0.1, 0.9, 0.4, 0.8, 0.4])
    assert presence.survivors(scores, 5, 0.3).tolist() == [1, 2, 3, 4]
    assert presence.survivors(scores, 3, 0.3).tolist() == [1, 2, 3]
    assert presence.survivors(scores, 5, 0.95).tolist() == [1], "somebody must answer"


def test_label_maps_name_classes_of_the_vocabulary():
    probability = np.zeros((2, 1, 3))
    probability[0, 0, 0] = probability[1, 0, 1:] = 0.7
    got = presence.label_map(probability, np.array([4, 11]))
    np.testing.assert_array_equal(got, [[4, 11, 11]])


def test_recall_by_k_by_counting():
    rng = np.random.default_rng(0)
    scores, areas = rng.random((6, 9)), rng.integers(0, 3, (6, 9)) * rng.integers(1, 50, (6, 9))
    table = presence.gate_recall(scores, areas, [1, 3, 9])
    for k, got in table.items():
        pixels = classes = 0
        for s, a in zip(scores, areas, strict=True):
            for c in sorted(range(9), key=lambda c: -s[c])[:k]:
                pixels += a[c]
                classes += a[c] > 0
        assert got["pixels"] == pytest.approx(pixels / areas.sum(), abs=1e-9)
        assert got["classes"] == pytest.approx(classes / (areas > 0).sum(), abs=1e-9)
    assert table[9] == {"pixels": 1.0, "classes": 1.0}


def test_nothing_labeled_has_no_recall():
    got = presence.gate_recall(np.ones((2, 3)), np.zeros((2, 3), int), [1])
    assert np.isnan(got[1]["pixels"]) and np.isnan(got[1]["classes"])


def test_the_reported_limits_end_with_everything():
    assert presence.recall_limits(17) == (1, 2, 4, 8, 16, 17)
    assert presence.recall_limits(847)[-2:] == (512, 847)
