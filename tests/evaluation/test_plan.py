# SPDX-License-Identifier: Apache-2.0
"""The plan that is told before a training: what the evaluation after it will cost."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from digseg_jax.config.schema import EvalConfig
from digseg_jax.evaluation.plan import cost, masks_of_a_view
from digseg_jax.segmentation.codecs import make_codec

SETTINGS = EvalConfig(ensemble=8, steps=2, exhaustive_limit=200, gate_limit=16)


@pytest.mark.parametrize(("classes", "masks"), [(150, 150 * 16), (847, 847 + 16 * 16)])
def test_masks_are_counted_as_the_evaluation_asks_for_them(folders, classes, masks):
    codec = make_codec("binary", tiny.config(folders).data)
    assert masks_of_a_view(SETTINGS, codec, classes) == masks


def test_names_that_share_a_mask_image_cost_it_once(folders):
    data = dataclasses.replace(tiny.config(folders).data, num_queries=32)
    prompted = make_codec("prompted", data)
    assert masks_of_a_view(SETTINGS, prompted, 30) == 16
    assert masks_of_a_view(SETTINGS, prompted, 150) == 5 + 16  # a coarse pass of five groups first


def test_the_cost_is_told_in_training_steps(folders):
    data = tiny.config(folders).data
    settings = dataclasses.replace(SETTINGS, split="test", num_images=10)
    told = cost(settings, data, 4, make_codec("binary", data))
    masks = 10 * 8 * 16
    assert "10 images of 'test', 8 classes, 8 members x 2 steps: 1,280 passes" in told
    assert f"about {round(masks / (3 * 4 * data.num_queries))} training steps" in told
