# SPDX-License-Identifier: Apache-2.0
"""Label maps to mask images and back."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.segmentation import binary
from digseg_jax.segmentation.codec import QUERY_LIMIT, latent_validity

LABEL = np.array([[[0, 0, 1, 1], [0, 2, 2, -1]]])  # [1, 2, 4]


def test_the_queried_class_is_plus_one_and_all_else_minus_one_in_three_equal_channels():
    masks = np.asarray(binary.encode_binary(LABEL, np.array([[0, 2, 5]])))
    assert masks.shape == (1, 3, 2, 4, 3)
    np.testing.assert_array_equal(masks[0, 0, ..., 0], [[1, 1, -1, -1], [1, -1, -1, -1]])
    np.testing.assert_array_equal(masks[0, 1, ..., 0], [[-1, -1, -1, -1], [-1, 1, 1, -1]])
    np.testing.assert_array_equal(masks[0, 2], -1)  # an absent class
    for channel in (1, 2):
        np.testing.assert_array_equal(masks[..., channel], masks[..., 0])


def test_every_image_has_its_own_queries():
    labels = np.concatenate([LABEL, LABEL])
    masks = np.asarray(binary.encode_binary(labels, np.array([[0], [1]])))
    np.testing.assert_array_equal(masks[:, 0, ..., 0] > 0, labels == [[[0]], [[1]]])


def test_what_was_encoded_decodes_to_the_mask():
    label = np.random.default_rng(0).integers(-1, 4, (3, 8, 8))
    masks = binary.encode_binary(label, np.array([[0, 1, 2, 3]] * 3))
    decoded = np.asarray(binary.decode_binary(masks)) > 0
    np.testing.assert_array_equal(decoded, label[:, None] == np.arange(4)[None, :, None, None])


def test_evidence_is_the_channel_mean_within_bounds():
    image = np.array([[[0.3, 0.0, 0.6], [9.0, 9.0, 9.0], [-5.0, 0.0, 0.0]]])
    np.testing.assert_allclose(binary.decode_binary(image), [[0.3, 1.0, -1.0]], rtol=1e-5)


def test_a_cell_with_any_ignored_pixel_is_invalid():
    valid = np.asarray(latent_validity(LABEL, 2))
    np.testing.assert_array_equal(valid, [[[True, False]]])
    np.testing.assert_array_equal(latent_validity(LABEL, 1), LABEL >= 0)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_validity_against_a_plain_loop(factor):
    label = np.random.default_rng(factor).integers(-1, 30, (2, 16, 8))
    got = np.asarray(latent_validity(label, factor))
    for b, y, x in np.ndindex(got.shape):
        cell = label[b, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert got[b, y, x] == (cell >= 0).all()


def test_the_mask_of_a_nested_class_covers_what_lies_inside():
    label = np.asarray([[[0, 1, 2, -1]]])  # cup, rim of the disc, background
    classes = np.asarray([[[1, 0], [0, 0]]])  # the disc covers the cup; the cup itself
    masks = binary.encode_binary(label, classes)
    assert masks.shape == (1, 2, 1, 4, 3)
    np.testing.assert_array_equal(masks[0, :, 0, :, 0], [[1, 1, -1, -1], [1, -1, -1, -1]])


def test_a_call_has_few_slots_and_little_padding():
    slots = binary.BinaryCodec().slots
    assert [slots(n) for n in (1, 3, 5, 16)] == [1, 4, 6, 16]
    for n in range(QUERY_LIMIT + 1, 900):
        calls = -(-n // slots(n))
        assert slots(n) <= QUERY_LIMIT and calls == -(-n // QUERY_LIMIT)
        assert calls * slots(n) - n < calls
