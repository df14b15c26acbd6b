# SPDX-License-Identifier: Apache-2.0
"""What is asked of an image: every class, those that a coarse pass finds, or those that are there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
from perfect import Reader

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets import registry
from digseg_jax.evaluation.evaluator import COARSE, Evaluator
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.metrics.presence import presence
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.segmentation.palette import PaletteCodec
from digseg_jax.segmentation.prompted import PromptedCodec

ONE = EStep(1, 1)
PROMPTS = ("water", "forest", "snow and ice", "barren")


def examples(labels):
    source = [
        {"image": np.zeros((*label.shape, 3), np.uint8), "label": label, "name": str(i)}
        for i, label in enumerate(labels)
    ]
    own = tuple((c,) for c in range(4))
    return EvalExamples(source, "val", tuple(range(len(source))), PROMPTS, own)


def evaluator(reader, labels, **changes):
    settings = dataclasses.replace(Config().eval, **changes)
    return Evaluator(reader, examples(labels), settings, seed=0)


@pytest.fixture
def asked():
    return []


@pytest.fixture
def reader(asked):
    """Every query is a little surer than the one before."""

    def read(image, query):
        asked.append(query)
        return np.full(image.shape[:2], 0.5 + 0.1 * PROMPTS.index(query), np.float32)

    sure = np.array([0.1, 0.9, 0.8, 0.2], np.float32)[:, None, None] * np.ones((1, 4, 4), np.float32)
    return Reader(read, sure)


def test_every_class_is_asked_for_up_to_a_limit_and_a_coarse_pass_decides_beyond(reader):
    label = [np.zeros((4, 4), np.int32)]
    assert evaluator(reader, label, exhaustive_limit=4).protocol == "exhaustive"
    assert evaluator(reader, label, exhaustive_limit=3).protocol == "gated"
    assert evaluator(reader, label, exhaustive_limit=3).protocols == ("gated", "oracle")


def test_the_gate_lets_the_surest_through(reader, asked):
    gated = evaluator(reader, [np.zeros((4, 4), np.int32)], gate_limit=2, gate_cut=0.3)
    scores = gated.scores(ONE, protocol="gated")
    assert asked == ["forest", "snow and ice"]
    assert scores.confusion[0, 2] == 16 and scores.rows[0]["queries"] == 2
    np.testing.assert_allclose(scores.rows[0]["presence"], [0.1, 0.9, 0.8, 0.2], atol=1e-6)
    assert scores.gate_recall()[1]["classes"] == 0.0 and scores.gate_recall()[4]["classes"] == 1.0


def test_a_gate_never_asks_for_what_no_class_claims(asked, reader):
    """Of domains the background is such a class, and no part of the vocabulary's size."""
    rest = dataclasses.replace(examples([np.zeros((4, 4), np.int32)]), rest=1)
    settings = dataclasses.replace(Config().eval, exhaustive_limit=3, gate_limit=2, gate_cut=0.0)
    gated = Evaluator(reader, rest, settings, seed=0)
    assert gated.protocol == "exhaustive"
    gated.scores(ONE, protocol="gated")
    assert asked == ["snow and ice", "barren"]


def test_an_oracle_knows_the_classes_and_one_of_an_empty_label_asks_something(reader, asked):
    labels = [np.array([[1, 3], [-1, 1]], np.int32), np.full((2, 2), -1, np.int32)]
    scores = evaluator(reader, labels).scores(ONE, protocol="oracle")
    assert asked == ["forest", "barren", "water"]
    assert scores.confusion.sum() == 3 and scores.confusion[1, 3] == 2


def test_a_palette_answers_all_of_its_classes(asked):
    palette = Reader(lambda image, query: np.ones(image.shape[:2], np.float32), codec=PaletteCodec(2))
    label = [np.zeros((4, 4), np.int32)]
    assert evaluator(palette, label, exhaustive_limit=1).protocols == ("exhaustive",)


def test_more_names_than_one_mask_image_can_show_go_through_the_gate(reader, asked):
    reader.task.codec = PromptedCodec(3)
    label = [np.zeros((4, 4), np.int32)]
    gated = evaluator(reader, label, gate_cut=0.0)
    assert gated.protocol == "gated"
    gated.scores(ONE)
    assert asked == ["forest", "snow and ice", "barren"]  # three, although `gate_limit` is larger
    reader.task.codec = PromptedCodec(4)
    assert evaluator(reader, label).protocol == "exhaustive"


def test_the_coarse_pass_is_one_step_through_the_probe(folders):
    task = tiny.load_task(tiny.config(folders), prompts=PROMPTS)
    segmenter = Segmenter(task, task.initial(), mesh=tiny.mesh())
    label = np.random.default_rng(0).integers(0, 4, (40, 56)).astype(np.int32)
    coarse = Evaluator(segmenter, examples([label]), task.config.eval, seed=3)
    row = coarse.scores(ONE, protocol="gated").rows[0]
    image = coarse.examples[0]["image"]
    (answer,) = segmenter.segment(
        [Request(image, 0, PROMPTS)], COARSE, key=3, mode="whole", decoder="probe"
    )
    np.testing.assert_allclose(row["presence"], presence(answer.cell_probabilities()), atol=1e-5)
    assert (answer.masks[0].slot == -1).all(), "nothing was decoded"


@pytest.mark.parametrize("name", ["ade20k_847", "pascal_context_459"])
def test_the_largest_vocabularies_are_gated_and_the_papers_closed_sets_are_not(name):
    limit = Config().eval.exhaustive_limit
    assert registry.spec(name).num_classes > limit
    for closed in ("ade20k", "coco_stuff", "cityscapes"):
        assert registry.spec(closed).num_classes <= limit
