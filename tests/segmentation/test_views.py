# SPDX-License-Identifier: Apache-2.0
"""Cutting images and putting answers together: every pixel gets the answer of its own place."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.segmentation.views import MODES, count_views, make_views, starts, window_weight

SHAPES = [(32, 32), (1, 1), (5, 90), (33, 31), (64, 100), (97, 32), (1, 40)]


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [32, 128])
def test_windows_cover_every_pixel_and_overlap(size):
    for length in [*range(size, 4 * size), 1000]:
        at = starts(length, size)
        assert at[0] == 0 and at[-1] == length - size
        assert all(0 < b - a <= 0.75 * size + 1 for a, b in zip(at, at[1:], strict=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_views_are_counted_without_cutting_them(shape):
    for mode in MODES:
        for side in (0, 20, 70):
            views = make_views(noise(*shape), (32, 48), mode, side)
            assert count_views(shape, (32, 48), mode, side) == len(views.crops)


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_that_agree_with_the_image_give_the_image(shape):
    """Each window answers with its own pixels' red and green."""
    image = noise(*shape)
    views = make_views(image, (32, 32), "window")
    assert views.crops.shape[1:] == (32, 32, 3) and views.crops.dtype == np.uint8
    for channel in range(2):
        got = views.assemble(views.crops[..., channel] / 255)
        np.testing.assert_allclose(got, image[..., channel] / 255, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_has_the_images_size_and_stays_between_its_extremes(mode, shape):
    views = make_views(noise(*shape), (32, 32), mode)
    answer = np.random.default_rng(1).random((len(views.crops), 32, 32))
    got = views.assemble(answer)
    assert got.shape == shape and got.min() >= 0 and got.max() <= 1
    assert mode == "window" or len(views.crops) == 1


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (40, 40)])
def test_aspect_keeps_proportions_and_cuts_its_padding_off(shape):
    height, width = shape
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 200  # the right half is bright
    views = make_views(image, (32, 32), "aspect")
    crop = views.crops[0, ..., 0]
    scale = 32 / max(shape)
    inside = crop[: round(height * scale), : round(width * scale)]
    assert (inside > 100).mean() == pytest.approx(0.5, abs=0.05)
    got = views.assemble(views.crops[..., 0] / 200.0)
    assert ((got > 0.5) == (image[..., 0] > 100)).mean() > 0.97


def test_windows_of_an_image_brought_to_a_short_side():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 100:] = 200
    views = make_views(image, (32, 32), "window", short_side=40)
    assert len(views.crops) == len(starts(40, 32)) * len(starts(80, 32))
    got = views.assemble(views.crops[..., 0] / 200.0)
    assert got.shape == (100, 200)
    assert (got[:, :97] < 0.01).all() and (got[:, 103:] > 0.99).all()


def test_views_may_be_wider_than_high():
    image = noise(60, 90)
    windows = make_views(image, (48, 64), "window")
    assert windows.crops.shape == (4, 48, 64, 3)
    green = windows.assemble(windows.crops[..., 1].astype(np.float32))
    np.testing.assert_allclose(green, image[..., 1], atol=1e-3)
    for mode in ("whole", "aspect"):
        views = make_views(image, (48, 64), mode)
        assert views.crops.shape == (1, 48, 64, 3)
        assert views.assemble(views.crops[..., 0].astype(np.float32)).shape == (60, 90)
    fitting = make_views(noise(40, 64), (48, 64), "window")
    assert len(fitting.crops) == 1
    assert fitting.assemble(fitting.crops[..., 0].astype(np.float32)).shape == (40, 64)


@pytest.mark.usefixtures("unchecked")
def test_wrong_modes_and_images_are_refused():
    with pytest.raises(ValueError, match="legal: window, whole, aspect"):
        make_views(noise(4, 4), (32, 32), "crop")
    for shape in ((4, 4), (4, 4, 4), (0, 4, 3)):
        with pytest.raises(ValueError, match="expected"):
            make_views(np.zeros(shape, np.uint8), (32, 32), "whole")


def test_the_weight_falls_towards_the_border_and_never_to_zero():
    weight = window_weight((32, 32))
    assert weight.min() > 0 and weight[16, 16] > weight[16, 2] > weight[2, 2]
