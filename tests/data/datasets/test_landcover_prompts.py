# SPDX-License-Identifier: Apache-2.0
"""Names of classes: what training says, and what it must never say."""

from __future__ import annotations

import re

import pytest

from digseg_jax.data.captions import Captions
from digseg_jax.data.datasets import landcover_prompts as prompts_lib
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.landcover import GROUPS, LABEL_SETS
from digseg_jax.data.vocabulary import Vocabulary

TRAINED = [text for lists in prompts_lib.PROMPTS.values() for names in lists.values() for text in names]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.mark.parametrize("name", prompts_lib.HELD_OUT)
def test_a_held_out_name_is_in_no_training_prompt(name):
    for prompt in [*TRAINED, *Captions(registry.spec("landcover")).texts]:
        assert name not in prompt, prompt
        assert words(name) - words(prompt), prompt


def test_each_held_out_name_stands_for_a_group():
    assert set(prompts_lib.HELD_OUT.values()) <= set(GROUPS)
    assert set(prompts_lib.HELD_OUT) == {"ocean", "woodland", "desert", "ice sheet", "farmland", "city"}


@pytest.mark.parametrize(("name", "label_set"), [("landcover", "groups"), ("landcover_igbp", "igbp")])
def test_a_bank_has_every_class_by_its_own_name_and_its_other_names(name, label_set):
    facts = registry.spec(name)
    assert facts.names == LABEL_SETS[label_set]
    words = Vocabulary.of(facts)
    texts = [tuple(words.prompts[row] for row in rows) for rows in words.rows]
    assert texts == list(prompts_lib.PROMPTS[label_set].values())


def test_no_prompt_names_two_groups():
    seen = [p for names in prompts_lib.GROUP_PROMPTS.values() for p in names]
    assert len(seen) == len(set(seen))
