# SPDX-License-Identifier: Apache-2.0
"""Counts and scores against scikit-learn, on random label maps and on awkward ones."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
)

from digseg_jax.metrics import confusion

N = 5


def random_maps(seed, shape=(3, 7, 9), n=N, ignored=0.2, unanswered=0.1):
    rng = np.random.default_rng(seed)
    label, prediction = rng.integers(0, n, (2, *shape)).astype(np.int32)
    label[rng.random(shape) < ignored] = -1
    prediction[rng.random(shape) < unanswered] = -1
    return label, prediction


def case(name):
    label, prediction = random_maps(1)
    if name == "absent classes":
        label[label > 1], prediction[prediction > 2] = 0, 2
    elif name == "class predicted but never true":
        label[label == 3] = 0
    elif name == "one pixel":
        label, prediction = np.array([[[2]]], np.int32), np.array([[[3]]], np.int32)
    elif name == "one ignored pixel":
        label, prediction = np.array([[[-1]]], np.int32), np.array([[[3]]], np.int32)
    elif name == "all ignored":
        label[:] = -1
    elif name == "all answered no class":
        prediction[:] = -1
    elif name == "perfect":
        prediction = np.where(label < 0, 4, label)
    elif name == "ignored pixels predicted wildly":
        prediction[label < 0] = 4
    return label, prediction


CASES = [
    "random", "absent classes", "class predicted but never true", "one pixel", "one ignored pixel",
    "all ignored", "all answered no class", "perfect", "ignored pixels predicted wildly",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_confusion_is_scikit_learns(name):
    label, prediction = case(name)
    got = confusion.confusion(label, prediction, N)
    keep = label >= 0
    true, predicted = label[keep], np.where(prediction[keep] < 0, N, prediction[keep])
    expected = np.zeros((N + 1, N + 1), int)
    if len(true):
        expected = confusion_matrix(true, predicted, labels=range(N + 1))
    np.testing.assert_array_equal(got, expected[:N])
    assert got.dtype == np.int64 and got.sum() == keep.sum()


@pytest.mark.parametrize("name", [c for c in CASES if "ignored" not in c or "pixels" in c])
def test_iou_is_scikit_learns_jaccard(name):
    label, prediction = case(name)
    iou = confusion.iou_per_class(confusion.confusion(label, prediction, N))
    keep = label >= 0
    true, predicted = label[keep], np.where(prediction[keep] < 0, N, prediction[keep])
    expected = jaccard_score(true, predicted, labels=range(N), average=None, zero_division=0)
    seen = np.isin(range(N), true) | np.isin(range(N), predicted)
    np.testing.assert_array_equal(np.isnan(iou), ~seen)
    np.testing.assert_allclose(iou[seen], expected[seen])
    counts = confusion.confusion(label, prediction, N)
    assert confusion.mean_iou(counts) == pytest.approx(expected[seen].mean())
    assert confusion.pixel_accuracy(counts) == pytest.approx(accuracy_score(true, predicted))


def test_counts_of_batches_add_up_to_the_counts_of_the_whole():
    label, prediction = random_maps(3, shape=(6, 5, 5))
    whole = confusion.confusion(label, prediction, N)
    parts = sum(confusion.confusion(label[i : i + 2], prediction[i : i + 2], N)
                for i in (0, 2, 4))  # fmt: skip
    np.testing.assert_array_equal(whole, parts)


def test_a_class_that_is_neither_true_nor_predicted_does_not_count_towards_the_mean():
    counts = np.zeros((3, 4), int)
    counts[0, 0] = 10
    assert confusion.mean_iou(counts) == 1.0
    assert np.isnan(confusion.iou_per_class(counts)[1:]).all()


def test_a_class_only_predicted_counts_as_zero():
    counts = np.array([[8, 2, 0], [0, 0, 0]])
    np.testing.assert_allclose(confusion.iou_per_class(counts), [0.8, 0.0])


def test_no_class_is_wrong_for_iou_and_accuracy():
    counts = np.array([[5, 0, 5], [0, 10, 0]])
    np.testing.assert_allclose(confusion.iou_per_class(counts), [0.5, 1.0])
    assert confusion.pixel_accuracy(counts) == 0.75


def test_nothing_counted_is_no_score_rather_than_a_crash_or_the_worst():
    empty = np.zeros((N, N + 1), int)
    assert np.isnan(confusion.pixel_accuracy(empty))
    assert np.isnan(confusion.iou_per_class(empty)).all()
    assert all(np.isnan(score) for score in confusion.closed_set_scores(empty).values())


def test_counts_beyond_int32_survive_on_the_host():
    counts = np.full((2, 3), 2**40, np.int64)
    np.testing.assert_allclose(confusion.iou_per_class(counts), [1 / 4, 1 / 4])


@pytest.mark.parametrize("seed", range(3))
def test_overlap_counts_each_querys_pixels_by_true_class(seed):
    label, _ = random_maps(seed, shape=(2, 6, 8))
    masks = np.random.default_rng(seed).random((2, 3, 6, 8)) < 0.4
    for image in range(2):
        for query in range(3):
            inside = label[image][masks[image, query]]
            expected = [(inside == c).sum() for c in range(N)]
            got = confusion.overlap(label[image], masks[image, query], N)
            np.testing.assert_array_equal(got, expected)


def overlaps_of(labels, masks_by_image, n):
    """[images, q, c] of masks [images, q, h, w]."""
    return np.array(
        [
            [confusion.overlap(label, np.asarray(mask), n) for mask in masks]
            for label, masks in zip(labels, masks_by_image, strict=True)
        ]
    )


def scores(masks_by_image, labels, n=2):
    labels = np.asarray(labels)
    overlaps = overlaps_of(labels, masks_by_image, n)
    areas = np.stack([(labels == c).sum((1, 2)) for c in range(n)], axis=1)
    return confusion.query_scores(overlaps, areas)


HALVES = np.array([[[0, 0, 1, 1]] * 2])


def test_masks_that_follow_their_text_match_and_no_wrong_query_does():
    got = scores([[HALVES[0] == 0, HALVES[0] == 1]], HALVES)
    assert got["matching_iou"] == 1.0 and got["wrong_query_iou"] == 0.0
    assert np.isnan(got["absent_rate"])  # both classes are there: nothing is absent


def test_masks_that_ignore_their_text_score_the_same_with_any_query():
    everything = np.ones((2, 4), bool)
    got = scores([[everything, everything]], HALVES)
    assert got["matching_iou"] == got["wrong_query_iou"] == 0.5


def test_absent_queries_are_judged_by_the_area_they_claim():
    label = np.zeros((1, 2, 4), int)
    claimed = np.zeros((2, 4), bool)
    claimed[0, 0] = True
    got = scores([[label[0] == 0, claimed]], label)
    assert got["matching_iou"] == 1.0 and got["absent_rate"] == 1 / 8
    assert np.isnan(got["wrong_query_iou"])  # there is no pair of present classes


def test_an_empty_mask_of_an_absent_class_covers_nothing():
    label = np.zeros((1, 2, 4), int)
    assert scores([[label[0] == 0, label[0] == 1]], label)["absent_rate"] == 0.0


def test_query_iou_pools_over_images_and_is_nan_where_nothing_is():
    labels = np.concatenate([HALVES, np.zeros_like(HALVES)])
    masks = np.stack([np.stack([x == 0, x == 1, x == 9]) for x in labels])
    masks[1, 0, 0] = False  # half of the second image is missed
    overlaps = overlaps_of(labels, masks, 3)
    areas = np.stack([(labels == c).sum((1, 2)) for c in range(3)], axis=1)
    got = confusion.query_iou(overlaps, areas)
    np.testing.assert_allclose(got[:2], [8 / 12, 1.0])
    assert np.isnan(got[2])


def test_a_query_of_nested_classes_is_compared_with_all_that_it_covers():
    """The disc contains the cup: a perfect mask of it also covers the cup's pixels."""
    label = np.array([[[0, 1, 1, 2]]])
    masks = [[label[0] == 0, label[0] >= 1, label[0] == 2]]
    overlaps = overlaps_of(label, masks, 3)
    areas = np.array([[1, 2, 1]])
    covers = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]], bool)
    np.testing.assert_array_equal(confusion.query_iou(overlaps, areas, covers), [1, 1, 1])
    assert confusion.query_iou(overlaps, areas)[1] == 2 / 3
    assert confusion.query_scores(overlaps, areas, covers)["matching_iou"] == 1.0


def oracle(label, prediction, rule, n=N):
    """The rules written down once more, class by class, pixel by pixel."""
    pairs = [(g, p) for g, p in zip(label.ravel(), prediction.ravel(), strict=True) if g >= 0]
    ious, recalls, weighted = [], [], 0.0
    for c in range(n):
        hit = sum(g == c and p == c for g, p in pairs)
        true = sum(g == c for g, _ in pairs)
        either = sum(g == c or p == c for g, p in pairs)
        if true:
            recalls.append(hit / true)
            weighted += hit / either * true / len(pairs)
        if rule == "official" or true or (rule == "mmseg" and either):
            ious.append(hit / either if either else 0.0)
    mean = lambda x: sum(x) / len(x) if x else float("nan")  # noqa: E731
    accuracy = sum(g == p for g, p in pairs) / len(pairs) if pairs else float("nan")
    fwiou = weighted if pairs else float("nan")
    return {"miou": mean(ious), "accuracy": accuracy, "mean_accuracy": mean(recalls), "fwiou": fwiou}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", confusion.ABSENT_RULES)
@pytest.mark.parametrize("name", CASES)
def test_every_absent_class_rule_is_the_written_one(name, rule):
    label, prediction = case(name)
    counts = confusion.confusion(label, prediction, N)
    got = confusion.closed_set_scores(counts, rule)
    assert got == pytest.approx(oracle(label, prediction, rule), abs=1e-9, nan_ok=True)


def test_the_rules_differ_by_points_without_a_wrong_pixel_more():
    label, prediction = random_maps(2, n=N)
    label[label >= 3] = 0
    counts = confusion.confusion(label, prediction, N)
    assert confusion.mean_iou(counts, "detectron2") == pytest.approx(
        confusion.mean_iou(counts, "mmseg") * 5 / 3
    )


def test_mean_accuracy_is_scikit_learns_balanced_accuracy():
    label, prediction = case("class predicted but never true")
    keep = (label >= 0) & (prediction >= 0)
    label = np.where(keep, label, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(label[keep], prediction[keep])
    got = confusion.mean_accuracy(confusion.confusion(label, prediction, N))
    assert got == pytest.approx(expected, abs=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_wrong_shapes_and_wrong_rules_are_refused():
    label, prediction = random_maps(0)
    with pytest.raises(ValueError, match="differ in shape"):
        confusion.confusion(label, prediction[:, :-1], N)
    with pytest.raises(ValueError, match=r"expected \[c, c \+ 1\]"):
        confusion.mean_iou(np.zeros((N, N), int))
    with pytest.raises(ValueError, match="legal: mmseg, detectron2, official"):
        confusion.mean_iou(np.zeros((N, N + 1), int), "voc")


def test_cityscapes_own_script_agrees(tmp_path):
    """Real PNGs through the official evaluation; its rule is `mmseg`."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    from cityscapesscripts.helpers.labels import labels
    from PIL import Image

    kept = [entry for entry in labels if not entry.ignoreInEval and entry.id >= 0]
    raw = np.array([entry.id for entry in kept])
    rng = np.random.default_rng(5)
    label = rng.integers(-1, 12, (2, 9, 11))  # seven classes never occur; -1 becomes "unlabeled"
    prediction = rng.integers(-1, 15, (2, 9, 11))  # three of them are predicted nevertheless
    files = []
    for name, maps in (("gt", label), ("pred", prediction)):
        for i, values in enumerate(maps):
            path = tmp_path / f"{name}_{i}.png"
            Image.fromarray(np.where(values < 0, 0, raw[values]).astype(np.uint8)).save(path)
            files.append(str(path))
    arguments = official.args
    arguments.evalPixelAccuracy = arguments.JSONOutput = arguments.evalInstLevelScore = False
    arguments.quiet = True
    theirs = official.evaluateImgLists(files[2:], files[:2], arguments)
    counts = confusion.confusion(label, prediction, len(kept))
    ours = confusion.iou_per_class(counts)
    expected = np.array([theirs["classScores"][entry.name] for entry in kept], float)
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    assert confusion.mean_iou(counts) == pytest.approx(theirs["averageScoreClasses"], abs=1e-9)
