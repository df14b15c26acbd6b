# SPDX-License-Identifier: Apache-2.0
"""Perfect masks score 1.0 for every class of every data set; wrong ones are counted where they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from perfect import Reader, answer
from sklearn.metrics import jaccard_score

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets import registry
from digseg_jax.evaluation.counts import count_image
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.journal import Journal, unpack
from digseg_jax.evaluation.scores import Scores
from digseg_jax.evaluation.suite import scores_of

ONE = EStep(1, 1)
NAMED = [name for name in registry.names() if name not in ("folder",)]


def examples_of(facts, source, split="val"):
    return EvalExamples(
        source, split, tuple(range(len(source))), facts.names,
        tuple(facts.covers(c) for c in range(facts.num_classes)),
        facts.metric, facts.absent, facts.inference,
    )  # fmt: skip


def made_up(facts, count=3, side=48):
    """Label maps that show every class, some pixels ignored; the image is the label in two bytes."""
    source = []
    for i in range(count):
        rng = np.random.default_rng(i)
        label = np.resize(rng.permutation(facts.num_classes), (side, side)).astype(np.int32)
        label[-2:] = -1
        image = np.stack([label % 256, label // 256 % 256, np.zeros_like(label)], -1).astype(np.uint8)
        source.append({"image": image, "label": label, "name": str(i)})
    return source


def perfect_reader(facts):
    """Answers every query with the region that its class covers."""

    def read(image, query):
        label = image[..., 0] + 256 * image[..., 1].astype(np.int32)
        return np.isin(label, facts.covers(facts.names.index(query))).astype(np.float32)

    return Reader(read, presence=np.ones((facts.num_classes, 2, 2), np.float32))


@pytest.mark.parametrize("name", NAMED)
def test_perfect_masks_score_one_for_every_class(name):
    """Through the evaluation that training ends with, and through the suites."""
    facts = registry.spec(name)
    examples = examples_of(facts, made_up(facts))
    settings = dataclasses.replace(Config().eval, exhaustive_limit=1000)
    evaluator = Evaluator(perfect_reader(facts), examples, settings, seed=0)

    scores = evaluator.scores(ONE)
    assert scores.miou == 1.0 and set(scores.per_class().values()) == {1.0}
    assert scores.boundary_iou() == 1.0
    single = scores.single_queries()
    assert single["matching_iou"] in (1.0, None)  # None: no class has a hundredth of an image
    assert not single["absent_rate"]

    row, _ = scores_of(evaluator, ONE, Journal(None, "x", ""), None)
    assert row["miou"] == 1.0
    if examples.metric == "foreground":
        assert row["iou_pooled"] == row["f1_per_image"] == 1.0
    if examples.metric == "region_dice":
        assert row["disc_dice"] == row["cup_dice"] == 1.0 and row["cdr_error"] == 0.0


@pytest.mark.parametrize("name", ["ade20k_847", "pascal_context_459"])
def test_a_gated_vocabulary_scores_one_where_no_image_has_more_classes_than_pass(name):
    """As shipped. An image with more classes than `gate_limit` cannot: the gate is an approximation."""
    facts, settings = registry.spec(name), Config().eval
    limit, source = settings.gate_limit, made_up(facts, -(-facts.num_classes // settings.gate_limit))
    for i, example in enumerate(source):
        own = np.arange(i * limit, min((i + 1) * limit, facts.num_classes))
        example["label"] = np.resize(own, (48, 48)).astype(np.int32)
        pair = [example["label"] % 256, example["label"] // 256, np.zeros((48, 48))]
        example["image"] = np.stack(pair, -1).astype(np.uint8)

    reader = perfect_reader(facts)
    reader.presence = lambda image: np.stack([reader.read(image, query) for query in facts.names])
    evaluator = Evaluator(reader, examples_of(facts, source), settings, seed=0)
    assert evaluator.protocol == "gated"
    scores = evaluator.scores(ONE)
    assert scores.miou == 1.0 and set(scores.per_class().values()) == {1.0}


def test_nested_classes_are_each_their_own_region():
    """An argmax over nested masks would give the inner class no pixel."""
    facts = registry.spec("refuge2")
    source = made_up(facts)
    label = source[0]["label"]
    masks = np.stack([np.isin(label, facts.covers(c)) for c in range(3)]).astype(np.float32)
    counted = count_image(examples_of(facts, source), label, answer(masks), [0, 1, 2])
    np.testing.assert_array_equal(counted.prediction[label >= 0], label[label >= 0])
    assert unpack(counted.row["overlap"])[1].tolist() == [0, *np.bincount(label[label > 0])[1:]]


def test_soft_masks_are_counted_as_scikit_learn_counts_the_most_probable():
    facts = registry.spec("camvid")
    source = made_up(facts)
    rng = np.random.default_rng(7)
    soft = {s["name"]: rng.random((facts.num_classes, 48, 48)).astype(np.float32) for s in source}
    examples = examples_of(facts, source)
    rows = [
        count_image(examples, s["label"], answer(soft[s["name"]]), range(facts.num_classes)).row
        for s in source
    ]
    valid = [s["label"] >= 0 for s in source]
    true = np.concatenate([s["label"][v] for s, v in zip(source, valid, strict=True)])
    found = np.concatenate([soft[s["name"]].argmax(0)[v] for s, v in zip(source, valid, strict=True)])
    expected = jaccard_score(true, found, average="macro")
    assert Scores(examples, "exhaustive", tuple(rows)).miou == pytest.approx(expected, abs=1e-12)


def test_a_bias_decides_between_classes_and_not_about_a_mask_alone():
    facts = registry.spec("phenobench")
    source = made_up(facts, 1)
    examples, label = examples_of(facts, source), source[0]["label"]
    masks = np.full((3, 48, 48), 0.4, np.float32)
    biased = answer(masks, (0.0, 1.0, 0.0))
    view = biased.masks[0]
    view.alone = masks
    view.probability = masks + np.array([0, 0.3, 0], np.float32)[:, None, None]
    counted = count_image(examples, label, biased, [0, 1, 2])
    assert (counted.prediction == 1).all() and not unpack(counted.row["overlap"]).any()


def test_a_mask_of_another_size_is_no_answer():
    facts = registry.spec("phenobench")
    source = made_up(facts, 1)
    with pytest.raises(ValueError, match="differ in shape"):
        count_image(
            examples_of(facts, source), source[0]["label"], answer(np.zeros((3, 8, 8))), [0, 1, 2]
        )


def test_masks_of_the_classes_that_are_there_are_kept_on_request():
    facts = registry.spec("camvid")
    source = made_up(facts, 1)
    label = np.where(source[0]["label"] > 4, 2, source[0]["label"])
    masks = np.zeros((facts.num_classes, 48, 48), np.float32)
    arguments = (examples_of(facts, source), label, answer(masks), range(facts.num_classes))
    assert not count_image(*arguments).masks
    assert set(count_image(*arguments, keep_masks=True).masks) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("name", "asked"), [("refuge2", (0, 1)), ("refuge2", (0,)), ("monuseg", (0,)), ("deepglobe", (0,))]
)
def test_what_a_gate_did_not_ask_for_counts_as_an_empty_mask(name, asked):
    facts = registry.spec(name)
    source = made_up(facts)
    examples = examples_of(facts, source)

    def own_metric(classes, empty=()):
        rows = []
        for one in source:
            label = one["label"]
            masks = np.stack([np.isin(label, facts.covers(c)) & (c not in empty) for c in classes])
            rows.append(count_image(examples, label, answer(masks.astype(np.float32)), classes).row)
        return Scores(examples, "gated", tuple(rows)).own_metric()

    every = range(facts.num_classes)
    gated = own_metric(asked)
    empty = own_metric(every, empty=set(every) - set(asked))
    assert str(gated) == str(empty) != str(own_metric(every))  # as text: nan is none of its equals
