# SPDX-License-Identifier: Apache-2.0
"""Training crops: image and label stay on each other's pixels, whatever is drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from digseg_jax.data import crops
from digseg_jax.data.crops import CropRules, Window, draw_window, random_view, view

PLAIN = CropRules(size=64, flip=0.0, jitter=0.0, class_share_cap=1.0)


def chequers(height, width, cell):
    """Label 0 and 1 in squares; the image shows the label: 40 or 200."""
    label = (np.add.outer(np.arange(height) // cell, np.arange(width) // cell) % 2).astype(np.int32)
    gray = np.where(label, 200, 40).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2), label


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape", [(96, 128), (150, 90)])
def test_a_chequer_board_stays_aligned_to_the_pixel(seed, shape):
    image, label = chequers(*shape, cell=24)
    rules = CropRules(size=64, flip=0.5, jitter=0.0)
    image, label = random_view(image, label, rules, rng(seed))
    seen = image[..., 0] > 120
    # between two squares, linear and nearest may round a pixel center on the border otherwise
    inside = label >= 0
    for shift, axis in ((-1, 0), (1, 0), (-1, 1), (1, 1)):
        inside &= label == np.roll(label, shift, axis=axis)
    assert inside.mean() > 0.2
    np.testing.assert_array_equal(seen[inside], label[inside] == 1)


def test_the_edge_of_a_half_lies_where_it_was():
    """The left half is 0: after any scale the border is at the same share of the width."""
    label = np.zeros((60, 60), np.int32)
    label[:, 30:] = 1
    image = np.repeat((label * 255).astype(np.uint8)[..., None], 3, axis=2)
    for size in (20, 60, 90, 240):
        got, ids = view(image, label, Window(0, 0, 60, 60, 0, 0, size, size), size)
        np.testing.assert_array_equal(ids[0], np.arange(size) >= size // 2)
        left, right = got[0, : size // 2, 0].astype(int), got[0, size // 2 :, 0].astype(int)
        np.testing.assert_allclose(left, 255 - right[::-1], atol=1)  # no half-pixel shift


def test_no_label_is_invented():
    label = rng().choice([-1, 0, 254, 255, 430, 846], size=(80, 120)).astype(np.int32)
    image = np.zeros((80, 120, 3), np.uint8)
    for seed in range(8):
        got = random_view(image, label, CropRules(size=64), rng(seed))[1]
        assert got.dtype == np.int32 and set(np.unique(got)) <= {-1, 0, 254, 255, 430, 846}


def test_what_lies_outside_the_image_is_ignored_and_gray():
    image, label = np.full((40, 100, 3), 255, np.uint8), np.ones((40, 100), np.int32)
    rules = CropRules(size=64, scale_min=0.5, scale_max=0.5, flip=0.0, jitter=0.0)
    got, ids = random_view(image, label, rules, rng())
    assert (ids == -1).sum() == 64 * 32  # the window is 80 high, the image 40
    np.testing.assert_array_equal(got[ids == -1], crops.PADDING)
    np.testing.assert_array_equal(got[ids == 1], 255)


def test_windows_keep_inside_and_show_the_whole_range_of_scales():
    sides = []
    for seed in range(400):
        w = draw_window(100, 150, PLAIN, rng(seed))
        assert 0 <= w.top <= 100 - w.height and 0 <= w.left <= 150 - w.width
        assert w.out_top + w.out_height <= 64 and w.out_left + w.out_width <= 64
        sides.append(max(w.height, w.width))
    assert min(sides) < 55 and max(sides) == 150  # 50 at scale 2; 200 at scale 1/2, cut to 150


def test_a_crop_of_nearly_one_class_is_drawn_again():
    label = np.zeros((100, 100), np.int32)
    label[:, 60:] = 1
    image = np.zeros((100, 100, 3), np.uint8)
    capped = CropRules(size=32, scale_min=2, scale_max=4, class_share_cap=0.75)

    def dominated(rules):
        shares = [random_view(image, label, rules, rng(s))[1].mean() for s in range(60)]
        return np.mean([max(v, 1 - v) > 0.8 for v in shares])

    assert dominated(capped) < 0.05
    assert dominated(CropRules(size=32, scale_min=2, scale_max=4, class_share_cap=1)) > 0.4


def test_an_image_of_one_class_or_of_none_still_gives_a_crop():
    image = np.zeros((50, 50, 3), np.uint8)
    for value in (3, -1):
        label = np.full((50, 50), value, np.int32)
        got = random_view(image, label, CropRules(size=32, scale_min=1, scale_max=2), rng())[1]
        np.testing.assert_array_equal(got, value)


def test_flips_happen_at_their_rate_and_take_the_label_along():
    label = np.tile(np.arange(32, dtype=np.int32), (32, 1))
    image = np.repeat(label[..., None], 3, axis=2).astype(np.uint8)
    rules = CropRules(size=32, scale_min=1, scale_max=1, flip=0.25, jitter=0, class_share_cap=1)
    views = [random_view(image, label, rules, rng(s)) for s in range(400)]
    for picture, ids in views:
        np.testing.assert_array_equal(picture[..., 0], ids)
    assert np.mean([ids[0, 0] == 31 for _, ids in views]) == pytest.approx(0.25, abs=0.06)


def test_grays_keep_their_hue_and_strength_zero_changes_nothing():
    for seed in range(20):
        matrix = crops.color_matrix(1.0, rng(seed))
        gray = matrix @ np.array([90, 90, 90, 1.0])
        np.testing.assert_allclose(gray, gray[0], atol=1e-9)
    identity = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    np.testing.assert_allclose(crops.color_matrix(0.0, rng()), identity, atol=1e-12)


def test_saturation_and_hue_are_those_of_independent_formulas():
    """Draws are replaced by a generator that says what it gives."""

    class Fixed:
        def __init__(self, draws):
            self.draws = draws

        def random(self, n):
            return np.zeros(n)

        def uniform(self, low, high, n):
            return np.asarray(self.draws)

    color = np.array([200.0, 40.0, 90.0])
    dull = crops.color_matrix(1.0, Fixed([0, 0, -1, 0]))[:, :3] @ color
    luma = 0.299 * 200 + 0.587 * 40 + 0.114 * 90
    np.testing.assert_allclose(dull, luma + 0.5 * (color - luma))
    turned = crops.color_matrix(1.0, Fixed([0, 0, 0, 1]))[:, :3] @ color
    assert turned.sum() == pytest.approx(color.sum())  # a rotation about the gray axis
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(color))
    bright = crops.color_matrix(1.0, Fixed([1, 1, 0, 0])) @ np.append(color, 1)
    np.testing.assert_allclose(bright, 1.5 * (color - 127.5) + 127.5 + 32)


def test_the_same_generator_gives_the_same_crop():
    image, label = chequers(90, 120, 8)
    a, b, c = (random_view(image, label, CropRules(size=48), rng(s)) for s in (5, 5, 6))
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])
    assert (a[0] != c[0]).any()


NATIVE = CropRules(size=5, scale_min=1.0, scale_max=1.0, class_share_cap=1.0, jitter=0.0, native=True)


def places(height, width):
    """An image and a label whose every pixel knows its place."""
    place = np.arange(height * width, dtype=np.int32).reshape(height, width)
    return np.repeat((place % 256).astype(np.uint8)[..., None], 3, axis=2), place


def test_native_crops_are_pixels_of_the_image_wherever_they_are_drawn():
    image, label = places(7, 9)
    draws = rng()
    rules = dataclasses.replace(NATIVE, flip=0.0)
    corners = set()
    for _ in range(300):
        crop, cut = random_view(image, label, rules, draws)
        row, column = divmod(int(cut[0, 0]), 9)
        np.testing.assert_array_equal(cut, label[row : row + 5, column : column + 5])
        np.testing.assert_array_equal(crop, image[row : row + 5, column : column + 5])
        corners.add((row, column))
    assert corners == {(row, column) for row in range(3) for column in range(5)}


def test_quarter_turns_and_mirrors_are_the_eight_symmetries_drawn_evenly():
    image, label = places(5, 5)
    rules = dataclasses.replace(NATIVE, quarter_turns=True)
    draws = rng()
    drawn = []
    for _ in range(1600):
        crop, cut = random_view(image.copy(), label, rules, draws)
        np.testing.assert_array_equal(crop[..., 0], cut)
        drawn.append(cut.tobytes())
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == 8 and min(counts) > 140
