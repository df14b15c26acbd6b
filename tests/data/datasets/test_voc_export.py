# SPDX-License-Identifier: Apache-2.0
"""Exports of labeling tools in Pascal VOC's form, read as they are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.pairs import Pair, divide
from digseg_jax.errors import UserError

COLORS = {"background": (0, 0, 0), "road": (128, 64, 128), "sky": (70, 130, 180)}
MAP = "# label:color_rgb:parts:actions\n" + "".join(
    f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in COLORS.items()
)


def write(root, lists, text=MAP):
    """An export with three examples; returns their ids."""
    labels = np.random.default_rng(0).integers(0, 3, (3, 6, 8))
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i, label in enumerate(labels):
        colored = np.asarray(list(COLORS.values()), np.uint8)[label]
        Image.fromarray(colored).save(root / "SegmentationClass" / f"{i}.png")
        Image.new("RGB", (8, 6), (i, 0, 0)).save(root / "JPEGImages" / f"{i}.jpg")
    for name, stems in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(stems) + "\n")
    (root / "labelmap.txt").write_text(text)
    return labels


def test_the_splits_and_colors_of_the_export_are_used(tmp_path):
    labels = write(tmp_path, {"train": ["0", "2"], "val": ["1"]})
    spec = registry.spec("folder", tmp_path)
    assert spec.names == tuple(COLORS) and dict(spec.splits) == {"train": 0, "val": 0}
    assert [c.color for c in spec.classes] == list(COLORS.values())
    train = registry.open_source("folder", tmp_path, "train")
    assert [str(e["name"]) for e in (train[0], train[1])] == ["0", "2"]
    np.testing.assert_array_equal(train[1]["label"], labels[2])
    np.testing.assert_array_equal(
        registry.open_source("folder", tmp_path, "val")[0]["label"], labels[1]
    )


def test_what_nobody_divided_is_divided_by_the_names(tmp_path):
    write(tmp_path, {"default": ["0", "1", "2"]})
    assert dict(registry.spec("folder", tmp_path).splits) == {"train": 0, "val": 0}
    sources = [registry.open_source("folder", tmp_path, split) for split in ("train", "val")]
    assert [len(source) for source in sources] == [2, 1]
    assert sorted(pair.name for source in sources for pair in source.pairs) == ["0", "1", "2"]


def test_a_fifth_is_for_validation_in_every_order():
    pairs = [Pair(f"image {i}", "", "") for i in range(12)]
    val, train = divide(pairs, "val"), divide(pairs, "train")
    assert len(val) == 2 and sorted(val + train) == sorted(pairs)
    assert sorted(divide(pairs[::-1], "val")) == sorted(val)
    assert divide(pairs[:1], "train") == pairs[:1]
    with pytest.raises(UserError, match="one image alone"):
        divide(pairs[:1], "val")


@pytest.mark.parametrize(
    ("lists", "text", "told"),
    [
        ({}, MAP, "no lists of examples"),
        ({"train": ["0", "7"]}, MAP, "1 of 2 listed examples have no file in .*, the first is '7'"),
        ({"train": ["0"]}, "road;1,2,3\n", "labelmap.txt:1: 'road;1,2,3'; a line is `name:R,G,B"),
        ({"train": ["0"]}, "a:0,0,0::\nroad:1,2,300::\n", "labelmap.txt:2"),
        ({"train": ["0"]}, "a:0,0,0::\nb:0,0,0::\n", "#000000 is line 1's already"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, lists, text, told):
    write(tmp_path, lists, text)
    with pytest.raises(UserError, match=told):
        registry.spec("folder", tmp_path)
        registry.open_source("folder", tmp_path, "train")


def test_a_color_that_the_map_lacks_is_told_with_its_place(tmp_path):
    write(tmp_path, {"train": ["0"]}, "background:0,0,0::\nroad:128,64,128::\n")
    with pytest.raises(UserError, match="color #4682b4 at row"):
        registry.open_source("folder", tmp_path, "train")[0]
