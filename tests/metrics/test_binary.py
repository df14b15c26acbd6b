# SPDX-License-Identifier: Apache-2.0
"""Foreground scores, pooled and per image, against scikit-learn and the rules written out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from digseg_jax.metrics import binary as mb

SKLEARN = {
    "iou": jaccard_score, "precision": precision_score, "recall": recall_score, "f1": f1_score,
}  # fmt: skip


def masks(seed=0, n=4, share=0.3):
    rng = np.random.default_rng(seed)
    return rng.random((2, n, 6, 7)) < share


@pytest.mark.parametrize("seed", range(3))
def test_pooled_scores_are_scikit_learns(seed):
    truth, prediction = masks(seed)
    got = mb.pooled(mb.binary_counts(truth, prediction))
    for name, function in SKLEARN.items():
        assert got[name] == pytest.approx(function(truth.ravel(), prediction.ravel()), abs=1e-9)
    assert got["iou"] == pytest.approx(got["f1"] / (2 - got["f1"]), abs=1e-9)


@pytest.mark.parametrize("empty", mb.EMPTY_RULES)
def test_per_image_scores_are_means_of_scikit_learns(empty):
    truth, prediction = masks(1, n=6)
    truth[0] = prediction[0] = False  # nothing to find, nothing found
    truth[1] = False  # nothing to find, something found
    prediction[2] = False  # all missed
    prediction[3] = truth[3]
    got = mb.per_image(mb.binary_counts(truth, prediction), empty)
    for name, function in SKLEARN.items():
        values = [
            function(t.ravel(), p.ravel(), zero_division=0)
            for t, p in zip(truth, prediction, strict=True)
        ]
        if empty == "one":
            values[0] = 1.0
        expected = np.mean(values[1:] if empty == "skip" else values)
        assert got[name] == pytest.approx(expected, abs=1e-9)


def test_pixels_that_are_not_labeled_do_not_count():
    truth, prediction = masks(2)
    valid = np.random.default_rng(9).random(truth.shape) < 0.5
    got = mb.pooled(mb.binary_counts(truth, prediction, valid))
    assert got["iou"] == pytest.approx(jaccard_score(truth[valid], prediction[valid]), abs=1e-9)
    nothing = mb.pooled(mb.binary_counts(truth, prediction, np.zeros_like(valid)))
    assert all(np.isnan(v) for v in nothing.values())


def test_one_pixel():
    yes, no = np.ones((1, 1, 1), bool), np.zeros((1, 1, 1), bool)
    assert mb.pooled(mb.binary_counts(yes, yes)) == dict.fromkeys(mb.NAMES, 1.0)
    missed = mb.pooled(mb.binary_counts(yes, no))
    assert missed["iou"] == missed["recall"] == missed["f1"] == 0 and np.isnan(missed["precision"])


def test_both_ways_of_averaging_are_told_apart_by_name():
    counts = np.array([[9, 1, 0], [0, 0, 2]])
    got = mb.foreground_scores(counts)
    assert got["iou_pooled"] == pytest.approx(9 / 12) and got["iou_per_image"] == pytest.approx(0.45)


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_and_rules_are_refused():
    truth, prediction = masks()
    with pytest.raises(ValueError, match="differ in shape"):
        mb.binary_counts(truth, prediction[:, :-1])
    with pytest.raises(ValueError, match="legal: one, zero, skip"):
        mb.per_image(np.zeros((1, 3), int), "nan")


class TestThreshold:
    """Searched by trying all, never on the split that is scored."""

    def test_the_best_pooled_f1_wins(self):
        rng = np.random.default_rng(3)
        truth = rng.random((5, 12, 12)) < 0.3
        probability = np.clip(0.25 * truth + 0.3 * rng.random(truth.shape), 0, 1)
        counts = np.stack([mb.threshold_counts(p, t) for p, t in zip(probability, truth, strict=True)])
        found = mb.search_threshold(counts, "train", "test")
        scores = {t: f1_score(truth.ravel(), (probability > t).ravel()) for t in mb.THRESHOLDS}
        assert scores[found] == max(scores.values())
        assert scores[found] > scores[0.5]

    def test_of_equally_good_ones_the_middle(self):
        truth = np.eye(4, dtype=bool)
        counts = mb.threshold_counts(np.where(truth, 0.9, 0.1), truth)
        assert mb.search_threshold(counts[None], "val", "test") == 0.5

    def test_the_scored_split_is_refused(self):
        with pytest.raises(ValueError, match="scored"):
            mb.search_threshold(np.zeros((1, len(mb.THRESHOLDS), 3), int), "test", "test")


class TestCupAndDisc:
    """REFUGE: the disc contains the cup."""

    CUP, RIM, BACK = 1, 0, 2

    def score(self, label, prediction):
        return mb.cup_and_disc(np.asarray(label), np.asarray(prediction), self.CUP, self.RIM)

    def test_dice_by_counting(self):
        rng = np.random.default_rng(0)
        label, prediction = rng.integers(0, 3, (2, 8, 9))
        got = self.score(label, prediction)
        for name, inside in (("cup", {self.CUP}), ("disc", {self.CUP, self.RIM})):
            a = sum(v in inside for v in label.ravel())
            b = sum(v in inside for v in prediction.ravel())
            both = sum(
                v in inside and w in inside
                for v, w in zip(label.ravel(), prediction.ravel(), strict=True)
            )
            assert got[f"{name}_dice"] == pytest.approx(2 * both / (a + b), abs=1e-9)

    def test_a_cup_taken_for_rim_leaves_the_disc_whole(self):
        label = np.full((6, 6), self.BACK)
        label[1:5, 1:5], label[2:4, 2:4] = self.RIM, self.CUP
        prediction = np.where(label == self.CUP, self.RIM, label)
        got = self.score(label, prediction)
        assert got == {"cup_dice": 0.0, "disc_dice": 1.0, "cdr_error": 0.5}

    def test_no_class_is_neither_and_two_empty_masks_agree(self):
        nothing = np.full((3, 3), self.BACK)
        assert self.score(nothing, np.full((3, 3), -1)) == {
            "cup_dice": 1.0, "disc_dice": 1.0, "cdr_error": 0.0,
        }  # fmt: skip

    def test_a_diameter_is_the_fattest_column_as_the_official_script_has_it(self):
        """Extents would be 1 + 8 rows for the stray pixel, and more for the tilted disc."""
        label = np.full((10, 6), self.BACK)
        label[0:4, 1], label[2:8, 2], label[4:9, 3] = self.RIM, self.RIM, self.RIM
        label[3:6, 2] = self.CUP  # 3 of 6 rows of the fattest column
        prediction = label.copy()
        prediction[9, 5] = self.CUP  # far away
        assert self.score(label, prediction)["cdr_error"] == 0.0
        prediction[2, 2] = self.CUP  # 4 of 6
        assert self.score(label, prediction)["cdr_error"] == pytest.approx(1 / 6)

    def test_means_over_images(self):
        rows = [{"cup_dice": 0.5}, {"cup_dice": 1.0}]
        assert mb.mean_scores(rows) == {"cup_dice": 0.75} and mb.mean_scores([]) == {}
