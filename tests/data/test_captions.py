# SPDX-License-Identifier: Apache-2.0
"""Captions of label crops, by the land cover's groups."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.data.captions import Captions
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.errors import UserError

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


def test_too_many_classes_are_refused():
    with pytest.raises(UserError, match="its 150 classes make more than"):
        Captions(registry.spec("ade20k"))
