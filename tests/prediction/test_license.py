# SPDX-License-Identifier: Apache-2.0
"""The license in a model card: terms of the data bind the weights as those of their start do."""

from __future__ import annotations

import dataclasses

import pytest

from digseg_jax import assets
from digseg_jax.prediction.description import read_description
from digseg_jax.prediction.model_card import model_card


@pytest.mark.parametrize(
    ("datasets", "license", "said"),
    [
        (["landcover", "landcover_igbp"], "apache-2.0", "Apache License 2.0, as the weights"),
        (["folder"], "other", "the terms of the data bind their use."),
        (["landcover", "camvid"], "other", "landcover (public domain), camvid (CC BY-NC 4.0)."),
    ],
)
def test_weights_from_our_own_are_under_the_terms_of_their_data(datasets, license, said):
    described = read_description(assets.FOLDER / "segmenter")
    card = model_card(dataclasses.replace(described, datasets=datasets))
    assert f"license: {license}\n" in card and said in card
