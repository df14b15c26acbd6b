# SPDX-License-Identifier: Apache-2.0
"""The land cover: its split, its labels, and that image and labels lie on one another."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.landcover import BLOCK, GROUP_OF_IGBP, GROUPS, IGBP, TILE, Tile
from digseg_jax.data.datasets.readers.landcover import LandCoverSource

SPLITS = ("train", "val", "test")
ROWS, COLUMNS = 2700 // TILE, 5400 // TILE


def block(top: int, left: int) -> tuple[int, int]:
    return top // BLOCK, left // BLOCK


def blocks_of(split: str) -> set[tuple[int, int]]:
    tiles = [Tile(r, c) for r in range(ROWS) for c in range(COLUMNS)]
    return {block(t.top, t.left) for t in tiles if t.split == split}


def test_a_block_belongs_to_one_split():
    train, val, test = map(blocks_of, SPLITS)
    assert not train & val and not train & test and not val & test
    assert len(train | val | test) == (ROWS // 3) * (COLUMNS // 3)


def test_the_written_rule_is_the_rule():
    for row, column, split in [(0, 0, "test"), (0, 3, "val"), (0, 6, "train"), (3, 9, "test"),
                               (2, 2, "test"), (3, 0, "train"), (6, 3, "test")]:  # fmt: skip
        assert Tile(row, column).split == split, (row, column)


def test_held_out_blocks_are_spread_over_rows_and_columns():
    for split in ("val", "test"):
        blocks = blocks_of(split)
        assert {r for r, _ in blocks} == set(range(ROWS // 3))
        assert len({c for _, c in blocks}) == COLUMNS // 3


def test_the_groups_cover_the_igbp_classes():
    assert len(GROUP_OF_IGBP) == len(IGBP) == 17
    assert set(GROUP_OF_IGBP) == set(range(len(GROUPS)))
    pairs = {"savanna": "shrub and grass", "cropland and natural vegetation mosaic": "cropland",
             "permanent wetland": "wetland", "barren": "barren", "water": "water"}  # fmt: skip
    for name, group in pairs.items():
        assert GROUPS[GROUP_OF_IGBP[IGBP.index(name)]] == group


class TestModeFilter:
    """The most frequent label of a window, on maps small enough to do by hand."""

    def test_a_speckle_goes(self):
        label = np.zeros((5, 5), np.uint8)
        label[2, 2] = 3
        np.testing.assert_array_equal(landcover.mode_filter(label, 3), 0)

    def test_a_straight_border_stays(self):
        label = np.repeat([[1, 1, 1, 2, 2, 2]], 6, axis=0).astype(np.uint8)
        np.testing.assert_array_equal(landcover.mode_filter(label, 3), label)

    def test_a_tie_keeps_the_pixels_own_label(self):
        # around the center: four 1, four 2 and its own; whichever it is makes it five
        for own in (1, 2):
            label = np.array([[1, 1, 1], [1, own, 2], [2, 2, 2]], np.uint8)
            assert landcover.mode_filter(label, 3)[1, 1] == own
        # three each of three labels: a tie that the pixel takes part in
        for own, other in ((0, 2), (2, 0)):
            label = np.array([[other, own, 1], [other, own, 1], [other, own, 1]], np.uint8)
            assert landcover.mode_filter(label, 3)[1, 1] == own

    def test_a_strict_majority_wins_over_the_own_label(self):
        label = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0]], np.uint8)  # 5 : 4
        assert landcover.mode_filter(label, 3)[1, 1] == 1

    def test_it_agrees_with_a_plain_loop(self, monkeypatch):
        monkeypatch.setattr(landcover, "PATCH", 8)  # several, and some that are not whole
        label = np.random.default_rng(0).integers(0, 4, (12, 15)).astype(np.uint8)
        padded = np.pad(label, 2, mode="symmetric")
        expected = np.empty_like(label)
        for y in range(12):
            for x in range(15):
                votes = np.bincount(padded[y : y + 5, x : x + 5].ravel(), minlength=4)
                best = votes.max()
                expected[y, x] = label[y, x] if votes[label[y, x]] == best else votes.argmax()
        np.testing.assert_array_equal(landcover.mode_filter(label, 5), expected)


def test_label_ids_are_in_range_and_every_class_occurs(cover):
    for name, classes in landcover.LABEL_SETS.items():
        label = cover.labels[name]
        assert label.shape == cover.image.shape[:2] == (2700, 5400)
        np.testing.assert_array_equal(np.unique(label), range(len(classes)))
    assert cover.image.dtype == np.uint8


def test_pixel_shares_are_the_known_ones(cover):
    igbp = np.bincount(cover.labels["igbp"].ravel()) / cover.labels["igbp"].size
    known = {"water": 0.68, "snow and ice": 0.10, "grassland": 0.05, "barren": 0.03}
    for name, share in known.items():
        assert igbp[IGBP.index(name)] == pytest.approx(share, abs=0.008), name
    rest = [s for n, s in zip(IGBP, igbp, strict=True) if n not in known]
    assert min(rest) > 1e-4 and max(rest) < 0.035


def test_the_two_label_sets_tell_the_same_story(cover):
    """They are filtered one by one, so borders differ a little."""
    same = GROUP_OF_IGBP[cover.labels["igbp"]] == cover.labels["groups"]
    assert same.mean() > 0.97


def test_labels_lie_on_the_image_not_shifted_and_not_flipped(cover):
    """Water in the labels is where the imagery is dark and blue."""
    image = cover.image.astype(int)
    blue = (image[..., 2] > image[..., 0] + 10) & (image.sum(axis=-1) < 180)
    water = cover.labels["groups"] == 0
    here = (blue == water).mean()
    assert here > 0.85
    for shift in [(8, 0), (-8, 0), (0, 8), (0, -8), (TILE, 0), (0, TILE)]:
        assert (blue == np.roll(water, shift, axis=(0, 1))).mean() < here - 0.001, shift
    for flipped in (water[::-1], water[:, ::-1]):
        assert (blue == flipped).mean() < here - 0.1


def test_snow_is_white_and_lies_in_the_south(cover):
    snow = cover.labels["groups"] == GROUPS.index("snow and ice")
    assert cover.image[snow].mean() > 150 > cover.image[~snow].mean()
    assert snow[2400:].mean() > 0.7 > 10 * snow[600:2100].mean()


def test_tiles_have_land_belong_to_their_split_and_come_row_by_row(cover):
    counts = {}
    for split in SPLITS:
        tiles = cover.tiles(split)
        counts[split] = len(tiles)
        assert [(t.row, t.column) for t in tiles] == sorted((t.row, t.column) for t in tiles)
        for t in tiles:
            assert t.split == split
            label = cover.window(t.top, t.left, TILE)["groups"]
            assert label.shape == (TILE, TILE) and (label != 0).mean() > landcover.MIN_LAND
    assert counts == {"train": 198, "val": 55, "test": 81}


def test_every_group_occurs_in_every_split(cover):
    for split in SPLITS:
        assert (LandCoverSource("groups", split).class_shares().sum(axis=0) > 0).all()


def test_training_scenes_never_show_a_pixel_of_a_held_out_block(cover):
    train = blocks_of("train")
    source = LandCoverSource("groups", "train")
    for i, tile in enumerate(source.tiles):
        top, left = tile.scene
        corners = {block(top + dy, left + dx) for dy in (0, 2 * TILE - 1) for dx in (0, 2 * TILE - 1)}
        assert corners == {block(tile.top, tile.left)} and corners <= train
        assert top <= tile.top and tile.top + TILE <= top + 2 * TILE
        assert left <= tile.left and tile.left + TILE <= left + 2 * TILE
        scene = source[i] if i % 40 == 0 else None
        if scene:
            assert scene["image"].shape == (2 * TILE, 2 * TILE, 3)
            np.testing.assert_array_equal(scene["image"], cover.window(top, left, 2 * TILE)["image"])


def test_eval_tiles_carry_image_label_and_name(cover):
    example = LandCoverSource("igbp", "test")[3]
    assert example["image"].shape == (TILE, TILE, 3) and example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32 and example["label"].max() < len(IGBP)
    assert example["name"] == cover.tiles("test")[3].name


def test_class_shares_are_those_of_the_tiles(cover):
    shares = LandCoverSource("groups", "val").class_shares()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    tile = cover.tiles("val")[7]
    water = cover.window(tile.top, tile.left, TILE)["groups"] == 0
    assert shares[7, 0] == water.mean()
