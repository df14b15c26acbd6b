# SPDX-License-Identifier: Apache-2.0
"""Presence from one coarse step, and images asked for a part of the vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.gating import Asker, Vocabulary, coarse_scorer
from digseg_jax.predictor import Predictor
from digseg_jax.segmentation.inference import EStep
from digseg_jax.segmentation.open_vocab import presence
from digseg_jax.tasks.segmentation import SegmentationTask

PROMPTS = ("water", "forest", "snow and ice", "barren")


@pytest.fixture(scope="module")
def predictor(folders):
    task = SegmentationTask(tiny.config(folders), prompts=PROMPTS)
    return Predictor(task, jax.tree.map(jnp.asarray, task.initial()))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3)).astype(np.uint8)


def test_the_scorer_is_one_step_through_the_probe(predictor, image):
    scores = coarse_scorer(predictor, PROMPTS)(image, 3)
    probed = Predictor(predictor.task, predictor.params, decoder="probe")
    masks = probed.predict_masks(
        predictor.squares([image]), PROMPTS, ensemble=1, steps=1, mode="whole", first=3
    )
    np.testing.assert_allclose(scores, presence(masks[0]), atol=1e-5)
    assert scores.shape == (len(PROMPTS),)


def test_only_who_is_asked_can_answer_and_nobody_hears_the_others(predictor, image):
    asker = Asker(predictor, Vocabulary(PROMPTS, (0.0, 0.5, 0.0, -0.5)), EStep(1, 1))
    everything, seconds = asker.exhaustive(image, 0)
    assert everything.shape == image.shape[:2] and seconds > 0
    label, _ = asker.over(image, 0, np.array([1, 3]))
    assert set(np.unique(label)) <= {1, 3}
    inside = np.isin(everything, (1, 3))
    np.testing.assert_array_equal(label[inside], everything[inside])
    truth = np.full(image.shape[:2], 2)
    assert (asker.oracle(image, 0, truth)[0] == 2).all()
    gated, _, scores = asker.gated(image, 0, lambda *_: np.array([0.1, 0.2, 0.3, 0.9]), 1, 0.5)
    assert (gated == 3).all() and scores.tolist() == [0.1, 0.2, 0.3, 0.9]


def test_a_palette_has_no_single_queries_to_gate():
    with pytest.raises(UserError) as caught:
        coarse_scorer(SimpleNamespace(task=SimpleNamespace(codec="palette")), PROMPTS)
    assert "codec='binary'" in tiny.one_line(caught.value)
