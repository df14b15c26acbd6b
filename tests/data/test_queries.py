# SPDX-License-Identifier: Apache-2.0
"""Which classes training asks for."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.data.queries import QuerySampler, class_counts

N = 8
LABEL = np.repeat([0, 1, 2, 3], 25).reshape(10, 10)  # four present, four absent


def draw(sampler, label=LABEL, n=2, times=4000, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([sampler(label, n, rng) for _ in range(times)])


def sampler(negative_rate=0.0, weights=None, **options):
    rarities = np.ones(N) if weights is None else np.asarray(weights)
    return QuerySampler(rarities, negative_rate, **options)


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5])
def test_the_share_of_queries_for_absent_classes_is_the_negative_rate(rate):
    drawn = draw(sampler(rate))
    assert (drawn >= 4).mean() == pytest.approx(rate, abs=0.02)


def test_absent_classes_are_asked_for_evenly():
    drawn = draw(sampler(0.5))
    shares = np.bincount(drawn[drawn >= 4], minlength=N)[4:] / (drawn >= 4).sum()
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_no_class_is_asked_twice_while_others_are_present():
    for row in draw(sampler(0.3), n=4, times=500):
        assert len(set(row)) == 4


def test_one_present_class_is_asked_again_rather_than_an_absent_one_unasked_for():
    only = np.zeros((4, 4), int)
    np.testing.assert_array_equal(draw(sampler(0.0), only, n=2, times=20), 0)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("ids", [3, 8, 60])
def test_pixels_are_counted_exactly_in_every_type(dtype, ids):
    rng = np.random.default_rng(ids)
    label = np.kron(rng.integers(-1, ids, (4, 4)), np.ones((16, 16))).astype(dtype)
    for speck in (None, ids + 1):  # one that a coarse sample does not show
        if speck is not None:
            label[1, 1] = speck
        expected = [(label == c).sum() for c in range(ids + 2)]
        np.testing.assert_array_equal(class_counts(label, ids + 2), expected)


def test_rare_classes_are_preferred():
    weights = [1, 1, 1, 4, 1, 1, 1, 1]
    shares = np.bincount(draw(sampler(weights=weights), n=1).ravel(), minlength=N) / 4000
    np.testing.assert_allclose(shares[:4], [1 / 7, 1 / 7, 1 / 7, 4 / 7], atol=0.03)


def test_large_areas_are_mildly_preferred():
    label = np.repeat([0, 1], [84, 16]).reshape(10, 10)
    shares = np.bincount(draw(sampler(), label, n=1).ravel(), minlength=2) / 4000
    expected = 0.84**0.25 / (0.84**0.25 + 0.16**0.25)
    assert shares[0] == pytest.approx(expected, abs=0.03)


def test_a_speck_is_neither_present_nor_absent():
    label = np.zeros((50, 50), int)
    label[0, 0] = 5  # 0.04 % of the crop
    drawn = draw(sampler(0.5), label, n=1)
    assert 5 not in drawn and set(np.unique(drawn)) == {0, 1, 2, 3, 4, 6, 7}


def test_ignored_pixels_belong_to_no_class():
    label = np.full((10, 10), -1)
    label[:5] = 3
    np.testing.assert_array_equal(draw(sampler(0.0), label, n=1, times=50), 3)


def test_a_crop_without_any_label_still_gets_queries():
    drawn = draw(sampler(0.0), np.full((4, 4), -1), n=2, times=50)
    assert drawn.shape == (50, 2) and drawn.min() >= 0 and drawn.max() < N


def test_more_queries_than_classes_repeat():
    everywhere = np.arange(64).reshape(8, 8) % N
    assert set(sampler()(everywhere, 12, np.random.default_rng(0))) == set(range(N))


def test_the_same_generator_gives_the_same_queries():
    np.testing.assert_array_equal(draw(sampler(0.3), seed=5), draw(sampler(0.3), seed=5))
    assert (draw(sampler(0.3), seed=5) != draw(sampler(0.3), seed=6)).any()
    assert sampler()(LABEL, 2, np.random.default_rng(0)).dtype == np.int32
