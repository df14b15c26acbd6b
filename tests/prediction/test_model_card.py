# SPDX-License-Identifier: Apache-2.0
"""The model card: its license, by the terms of the data and of the start, and its scores."""

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


def test_a_score_that_nothing_was_measured_for_is_a_dash():
    described = read_description(assets.FOLDER / "segmenter")
    facts = {
        "dataset": "folder", "split": "val", "num_images": 1, "ensemble": 1, "steps": 1,
        "spacing": "trailing", "protocol": "exhaustive", "inference": "slide", "view_size": [64],
    }  # fmt: skip
    card = model_card(described, {**facts, "miou": 0.5, "accuracy": None})
    assert "| 0.500 | – |" in card

    row = {"dataset": "folder", "num_images": 1, "split": "val", "asked_miou": None, "estep": "1x1"}
    assert "| folder | 1 of val | – |" in model_card(
        described, {"suite": "domains", "seed": 0, "rows": [row]}
    )
