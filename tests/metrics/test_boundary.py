# SPDX-License-Identifier: Apache-2.0
"""Boundary IoU against the definition, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.metrics import boundary


def band(mask, width):
    """Pixels with something outside (or beyond the image) at chessboard distance <= width."""
    height, columns = mask.shape
    out = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        near = [
            0 <= v < height and 0 <= u < columns and mask[v, u]
            for v in range(y - width, y + width + 1)
            for u in range(x - width, x + width + 1)
        ]
        out[y, x] = not all(near)
    return out


def blobs(seed, shape=(23, 17), n=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, n, (5, 4))
    return coarse.repeat(5, 0).repeat(5, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_band_is_the_definition(width):
    mask = blobs(0) == 1
    np.testing.assert_array_equal(boundary.inner_band(mask, width), band(mask, width))


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_score(seed):
    label, prediction = blobs(seed), blobs(seed + 10)
    label = np.where(np.random.default_rng(seed).random(label.shape) < 0.1, -1, label)
    prediction[:3] = -1
    got = boundary.boundary_counts(label, prediction, 4, ratio=0.08)
    width = round(0.08 * float(np.hypot(*label.shape)))
    ious = []
    for c in range(4):
        true, found = (band(m == c, width) & (label >= 0) for m in (label, prediction))
        assert got[c].tolist() == [(true & found).sum(), (true | found).sum()]
        if (true | found).any():
            ious.append((true & found).sum() / (true | found).sum())
    assert boundary.boundary_iou(got) == pytest.approx(np.mean(ious), abs=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_awkward_maps():
    one = np.zeros((1, 1), int)
    assert boundary.boundary_iou(boundary.boundary_counts(one, one, 2)) == 1.0
    ignored = np.full((4, 4), -1)
    assert np.isnan(boundary.boundary_iou(boundary.boundary_counts(ignored, ignored + 1, 2)))
    with pytest.raises(ValueError, match="differ in shape"):
        boundary.boundary_counts(ignored, ignored[:3], 2)
    assert boundary.band_width(3, 4) == 1 and boundary.band_width(600, 800) == 20
