# SPDX-License-Identifier: Apache-2.0
"""Sizes: how probabilities reach the label's resolution."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.segmentation import resize


def bilinear(plane, height, width):
    """Half-pixel centers, edges repeated, written out."""
    out = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        y = (i + 0.5) * plane.shape[0] / height - 0.5
        x = (j + 0.5) * plane.shape[1] / width - 0.5
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - abs(y - y0 - dy)) * (1 - abs(x - x0 - dx))
            row = np.clip(y0 + dy, 0, plane.shape[0] - 1)
            column = np.clip(x0 + dx, 0, plane.shape[1] - 1)
            out[i, j] += weight * plane[row, column]
    return out


@pytest.mark.parametrize("size", [(4, 5), (9, 13), (1, 1), (2, 3)])
def test_probabilities_are_resized_bilinearly(size):
    probability = np.random.default_rng(0).random((2, 4, 5))
    got = resize.resize_probability(probability, *size)
    expected = np.stack([bilinear(p, *size) for p in probability])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.dtype == np.float32


def test_labels_of_resized_probabilities_differ_from_resized_labels():
    """Why it matters: two of three classes meet between the samples of a coarse map."""
    probability = np.zeros((3, 1, 2), np.float32)
    probability[0, 0] = 0.6, 0.0
    probability[1, 0] = 0.4, 0.45
    probability[2, 0] = 0.0, 0.55
    fine = resize.resize_probability(probability, 1, 6).argmax(0)
    assert set(np.unique(fine)) == {0, 1, 2}
    assert set(np.unique(probability.argmax(0))) == {0, 2}


def test_images_keep_their_mean_when_they_shrink():
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3)).astype(np.uint8)
    small = resize.resize_image(image, 16, 12)
    assert small.shape == (16, 12, 3) and abs(small.mean() - image.mean()) < 1
    assert resize.resize_image(image, 64, 48) is image
