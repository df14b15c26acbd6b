# SPDX-License-Identifier: Apache-2.0
"""Which images an evaluation shows."""

from __future__ import annotations

import numpy as np

from digseg_jax.evaluation.counts import Counted
from digseg_jax.evaluation.gallery import LONGEST, Shown


def counted(height=6, width=8):
    return Counted({}, np.zeros((height, width), np.int32), {1: np.ones((height, width), np.float16)})


def choose(scores, count, folder):
    shown = Shown(count, len(scores), folder)
    for i, score in enumerate(scores):
        shown.offer(i, score, counted())
    chosen, kinds = shown.final()
    assert {f"{i}.npz" for i in chosen} <= {p.name for p in folder.glob("*")}
    return chosen, kinds


def test_the_worst_and_the_best_are_among_them(tmp_path):
    scores = np.random.default_rng(0).random(50).tolist()
    scores[7] = float("nan")
    chosen, kinds = choose(scores, 12, tmp_path)
    order = sorted((i for i in range(50) if i != 7), key=scores.__getitem__)
    assert {i for i, kind in kinds.items() if kind == "worst"} == set(order[:3])
    assert {i for i, kind in kinds.items() if kind == "best"} == set(order[-3:])
    assert set(kinds) <= set(chosen) and {0, 8, 16, 25, 33, 41} <= set(chosen)


def test_a_small_gallery_is_spread_and_an_empty_one_empty(tmp_path):
    assert choose([0.5] * 9, 3, tmp_path)[0] == [0, 3, 6]
    assert choose([0.5] * 9, 0, tmp_path)[0] == []
    assert not Shown(0, 9, tmp_path).wanted


def test_typical_images_are_those_of_the_spread_nearest_to_the_median(tmp_path):
    scores = [i / 40 for i in range(40)]
    kinds = choose(scores, 12, tmp_path)[1]
    assert sorted(i for i, kind in kinds.items() if kind == "typical") == [13, 20, 26]


def test_without_extremes_the_choice_does_not_follow_the_scores(tmp_path):
    for scores in ([0.5] * 8, [i / 8 for i in range(8)]):
        shown = Shown(4, 8, tmp_path, extremes=0)
        for i, score in enumerate(scores):
            shown.offer(i, score, counted())
        assert shown.final() == ([0, 2, 4, 6], {})


def test_masks_are_kept_for_the_images_that_may_be_shown_only(tmp_path):
    shown = Shown(2, 100, tmp_path)
    for i in range(100):
        shown.offer(i, 0.5, counted())
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_kept_of_a_large_image_is_no_larger_than_it_is_shown(tmp_path):
    Shown(1, 1, tmp_path).offer(0, 0.5, counted(LONGEST * 3, LONGEST * 4))
    stored = np.load(tmp_path / "0.npz")
    assert stored["prediction"].shape == stored["masks"].shape[1:] == (LONGEST * 3 // 4, LONGEST)
