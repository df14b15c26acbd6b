# SPDX-License-Identifier: Apache-2.0
"""Crops and symmetries: image and label always move together."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.data.crops import random_crop, random_dihedral


def scene(height=12, width=15):
    """Every pixel knows its place: image and labels can be compared after any move."""
    place = np.arange(height * width).reshape(height, width)
    image = np.stack([place % 256, place // 256, (place * 7) % 256], axis=-1).astype(np.uint8)
    return {"image": image, "groups": place.astype(np.int32), "igbp": (place + 1000).astype(np.int32)}


def chequers(size=8):
    board = np.indices((size, size)).sum(axis=0) % 2
    return {"image": np.repeat(255 * board[..., None], 3, axis=-1).astype(np.uint8),
            "label": board.astype(np.int32)}  # fmt: skip


def assert_together(example):
    place = example["groups"]
    np.testing.assert_array_equal(example["igbp"], place + 1000)
    image = np.stack([place % 256, place // 256, (place * 7) % 256], axis=-1)
    np.testing.assert_array_equal(example["image"], image)


@pytest.mark.parametrize("seed", range(20))
def test_image_and_labels_move_together(seed):
    rng = np.random.default_rng(seed)
    cropped = random_crop(scene(), 9, rng)
    assert_together(cropped)
    assert_together(random_dihedral(cropped, rng))


@pytest.mark.parametrize("seed", range(8))
def test_a_chequer_board_stays_one(seed):
    rng = np.random.default_rng(seed)
    moved = random_dihedral(random_crop(chequers(), 5, rng), rng)
    np.testing.assert_array_equal(moved["image"][..., 0] > 0, moved["label"] == 1)
    assert (np.diff(moved["label"], axis=0) != 0).all() and (np.diff(moved["label"], axis=1) != 0).all()


def test_every_position_is_drawn_and_none_beyond():
    rng = np.random.default_rng(0)
    corners = {int(random_crop(scene(5, 6), 4, rng)["groups"][0, 0]) for _ in range(300)}
    assert corners == {row * 6 + column for row in range(2) for column in range(3)}


def test_all_eight_symmetries_are_drawn_evenly():
    rng = np.random.default_rng(0)
    square = {k: v[:4, :4] for k, v in scene().items()}
    drawn = [random_dihedral(square, rng)["groups"].tobytes() for _ in range(1600)]
    counts = np.array([drawn.count(x) for x in set(drawn)])
    assert len(counts) == 8 and counts.min() > 140


def test_a_crop_of_the_whole_is_the_whole():
    whole = scene(9, 9)
    np.testing.assert_array_equal(random_crop(whole, 9, np.random.default_rng(0))["groups"],
                                  whole["groups"])  # fmt: skip


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="crop of 13 pixels from an image of 12x15"):
        random_crop(scene(), 13, np.random.default_rng(0))
