# SPDX-License-Identifier: Apache-2.0
"""Names of classes: what training says, what it must never say, and captions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from digseg_jax.data.datasets import landcover_prompts as prompts_lib
from digseg_jax.data.datasets.landcover import GROUPS, LABEL_SETS

BOTH = ("groups", "igbp")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.mark.parametrize("name", prompts_lib.HELD_OUT)
def test_a_held_out_name_is_in_no_training_prompt(name):
    prompts, _ = prompts_lib.training_prompts(BOTH)
    for prompt in [*prompts, *prompts_lib.captions()]:
        assert name not in prompt, prompt
        assert words(name) - words(prompt), prompt


def test_each_held_out_name_stands_for_a_group():
    assert set(prompts_lib.HELD_OUT.values()) <= set(GROUPS)
    assert set(prompts_lib.HELD_OUT) == {"ocean", "woodland", "desert", "ice sheet", "farmland", "city"}


@pytest.mark.parametrize("label_set", BOTH)
def test_every_class_has_prompts_and_the_first_is_its_own_name(label_set):
    prompts, ids = prompts_lib.training_prompts((label_set,))
    assert len(ids[label_set]) == len(LABEL_SETS[label_set])
    for name, rows in zip(LABEL_SETS[label_set], ids[label_set], strict=True):
        assert prompts[rows[0]] == name


def test_prompt_ids_of_two_label_sets_share_one_bank():
    prompts, ids = prompts_lib.training_prompts(BOTH)
    rows = [row for label_set in BOTH for group in ids[label_set] for row in group]
    assert rows == list(range(len(prompts)))


def test_no_prompt_names_two_groups():
    seen = [p for names in prompts_lib.GROUP_PROMPTS.values() for p in names]
    assert len(seen) == len(set(seen))


def test_captions_are_all_choices_of_one_to_three_groups():
    captions = prompts_lib.captions()
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
    caption = prompts_lib.captions()[prompts_lib.caption_id(crop(**pixels))]
    assert caption == f"satellite image of {expected}"


def test_a_patchwork_still_gets_a_caption():
    label = np.arange(64).reshape(8, 8) % 8  # every group has an eighth
    assert 0 <= prompts_lib.caption_id(label) < len(prompts_lib.captions())
