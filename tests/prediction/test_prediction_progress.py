# SPDX-License-Identifier: Apache-2.0
"""A watched segmentation: member by member and step by step, with the masks of one that is not."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from digseg_jax.config.sampling import EStep
from digseg_jax.config.templates import PLACE
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter

ROUNDING = 2e-5  # of a probability
WORDS = ("water", "forest", "snow and ice")


@pytest.fixture(scope="module")
def task(folders):
    return tiny.load_task(tiny.config(folders, eval__view_size=()), prompts=WORDS)


@pytest.fixture(scope="module", params=["latent_mean", "vae"])
def segmenter(request, task):
    """A view is 32 pixels square; one at a time."""
    settings = tiny.config(request.getfixturevalue("folders"), eval__view_size=()).eval
    object.__setattr__(settings, "decoder", request.param)
    return Segmenter(task, task.initial(), settings, mesh=tiny.mesh())


def segment(segmenter, estep, watch=None, **changes):
    pixels = np.random.default_rng(3).integers(0, 256, (32, 50, 3)).astype(np.uint8)
    asked = Request(pixels, 5, WORDS, **changes)
    return segmenter.segment([asked], estep, key=7, watch=watch)[0].stack()


@pytest.mark.parametrize("estep", [EStep(2, 2), EStep(3, 1)], ids=str)
def test_the_masks_are_those_of_one_that_nobody_watches(segmenter, estep):
    watched = segment(segmenter, estep, lambda moment: None)
    np.testing.assert_allclose(watched, segment(segmenter, estep), atol=ROUNDING)


def test_every_step_of_every_member_of_every_view_is_told(segmenter):
    told = []
    segment(segmenter, EStep(2, 2), lambda m: told.append((m.done, m.total, m.member, m.step)))
    views = len(told) // 4
    steps = [(1, 1), (1, 2), (2, 1), (2, 2)] * views
    assert views > 1
    assert told == [(i, 4 * views, *step) for i, step in enumerate(steps, start=1)]


def test_the_masks_so_far_grow_into_the_final_ones(segmenter):
    seen = []
    estep = EStep(2, 2)
    final = segment(segmenter, estep, lambda m: seen.append(m.masks().stack()))
    assert not seen[0][:, :, -1].any(), "a view that was not sampled yet is 0"
    assert seen[0][:, :, 0].all() and not np.array_equal(seen[0][:, :, 0], final[:, :, 0])
    if segmenter.settings.decoder == "latent_mean":
        np.testing.assert_allclose(seen[-1], final, atol=ROUNDING)
    np.testing.assert_array_equal(seen[-1][:, :, 0], final[:, :, 0])


def test_the_first_member_alone_is_what_the_first_steps_show(segmenter):
    seen = []
    segment(segmenter, EStep(2, 2), lambda m: seen.append(m.masks().stack()))
    alone = segment(segmenter, EStep(1, 2))
    np.testing.assert_allclose(seen[1][:, :, 0], alone[:, :, 0], atol=ROUNDING)
    assert np.abs(segment(segmenter, EStep(2, 2)) - alone).max() > 100 * ROUNDING


def test_several_prompts_of_a_query_are_averaged_while_it_is_watched(segmenter):
    seen, words = [], {"templates": (PLACE, "the {}")}
    final = segment(segmenter, EStep(1, 1), lambda m: seen.append(m.masks().stack()), **words)
    assert seen[-1].shape == final.shape
    np.testing.assert_array_equal(seen[-1], final)


def test_what_a_watcher_raises_ends_the_segmentation(segmenter):
    told = []

    def stop(moment):
        told.append(moment)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(segmenter, EStep(4, 2), stop)
    assert len(told) == 3
