# SPDX-License-Identifier: Apache-2.0
"""Captions of label crops, by the land cover's groups."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.config.schema import DataConfig, PartConfig
from digseg_jax.data.captions import Captions, captions_of
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.landcover import GROUPS

CAPTIONS = Captions(registry.spec("landcover"))


def test_captions_are_all_choices_of_one_to_three_groups():
    captions = CAPTIONS.texts
    assert len(captions) == len(set(captions)) == 8 + 28 + 56
    assert captions[0] == "satellite image of water"


def crop(**pixels: int) -> np.ndarray:
    """A label crop with so many pixels of each group."""
    names = {name.replace(" ", "_"): i for i, name in enumerate(GROUPS)}
    return np.concatenate([np.full(n, names[k]) for k, n in pixels.items()]).reshape(10, 10)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ({"water": 100}, "water"),
        ({"water": 95, "urban": 5}, "water"),  # too small to be mentioned
        ({"barren": 60, "water": 40}, "water, barren"),  # in the groups' order, not by size
        ({"forest": 9, "cropland": 91}, "forest, cropland"),
        ({"water": 40, "forest": 30, "barren": 20, "urban": 10}, "water, forest, barren"),
    ],
)
def test_a_caption_names_the_largest_groups(pixels, expected):
    caption = CAPTIONS.texts[CAPTIONS.id_of(crop(**pixels))]
    assert caption == f"satellite image of {expected}"


def test_a_patchwork_still_gets_a_caption():
    label = np.arange(64).reshape(8, 8) % 8  # every group has an eighth
    assert 0 <= CAPTIONS.id_of(label) < len(CAPTIONS.texts)


def test_pixels_without_a_label_are_of_no_class():
    label = np.full((8, 8), -1)
    label[0] = 3
    assert CAPTIONS.texts[CAPTIONS.id_of(label)] == "satellite image of cropland"


def test_of_many_classes_a_caption_names_fewer():
    captions = Captions(registry.spec("pascal_context_59"))
    assert len(captions.texts) == 59 + 59 * 58 // 2
    captions = Captions(registry.spec("ade20k"))
    assert len(captions.texts) == 150
    label = np.repeat([3, 3, 7], 12).reshape(6, 6)
    assert captions.id_of(label) == 3


def test_a_background_is_named_only_where_there_is_nothing_else():
    captions = Captions(registry.spec("pascal_voc_21"), unasked=("background",))
    label = np.zeros((10, 10), int)
    assert captions.texts[captions.id_of(label)] == "image of background"
    label[0], label[1] = 8, 8
    assert captions.texts[captions.id_of(label)] == "image of cat"


def test_captions_of_a_mixture_are_numbered_over_its_data_sets():
    parts = (PartConfig("landcover"), PartConfig("pascal_voc_21", unasked=("background",)))
    first, second = captions_of(DataConfig(mixture=parts))
    texts = first.texts + second.texts
    assert texts[first.id_of(crop(urban=100))] == "satellite image of urban"
    assert texts[second.id_of(np.full((4, 4), 12))] == "image of dog"
