# SPDX-License-Identifier: Apache-2.0
"""A calibration is fitted to an even choice of pixels whose scores stay within a bound."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from perfect import Reader

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import EvalConfig
from digseg_jax.evaluation import fitting, job
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.segmentation import calibration

SHAPE = (64, 96)
CLASSES = ("ground", "road", "tree")


class Scored(Reader):
    """Answers with every member's evidence, as a segmenter does that is asked for it."""

    def __init__(self):
        super().__init__(None)
        self.images = []

    def segment(self, requests, estep, **options):
        self.images += [int(r.image[0, 0, 0]) for r in requests]
        rng = np.random.default_rng(0)
        planes = rng.uniform(-1, 1, (len(CLASSES), estep.ensemble, *SHAPE)).astype(np.float32)
        one = SimpleNamespace(num_queries=len(CLASSES), evidence=lambda q: planes[q])
        return [one for _ in requests]


def split(name, count):
    label = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int32) % 3
    image = np.zeros((*SHAPE, 3), np.uint8)
    source = [{"image": image + i % 256, "label": label, "name": str(i)} for i in range(min(count, 64))]
    return EvalExamples(source, name, tuple(range(count)), CLASSES, ((0,), (1,), (2,)))


def evaluator(**settings):
    return Evaluator(Scored(), split("test", 2), EvalConfig(decoder="vae", **settings), seed=0)


@pytest.fixture
def given(monkeypatch):
    """Evidence and labels that fits get."""
    found, fit = [], calibration.fit

    def noted(evidence, label, *rest, **more):
        found.append((evidence, label))
        return fit(evidence, label, *rest, **more)

    monkeypatch.setattr(calibration, "fit", noted)
    return found


def test_few_images_are_fitted_to_every_fourth_pixel(given):
    own = evaluator()
    own.calibrate(EStep(2, 1), split("val", 5))
    ((evidence, label),) = given
    assert evidence.shape == (5 * 16 * 24, 3, 2) and own.segmenter.images == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(label[: 16 * 24], split("val", 1)[0]["label"][::4, ::4].ravel())


@pytest.mark.parametrize(("members", "images"), [(1, 30), (16, 20)])
def test_many_images_give_fewer_pixels_each_within_the_bound(given, monkeypatch, members, images):
    """All of Cityscapes' training images took 30 GB on every process."""
    monkeypatch.setattr(fitting, "EVIDENCE", 2**18)
    monkeypatch.setattr(fitting, "LEAST", 64)
    own = evaluator()
    own.calibrate(EStep(members, 1), split("val", 30))
    ((evidence, label),) = given
    assert 2**16 < evidence.nbytes + label.nbytes <= 2**18

    # With many members images are left out, too, so that each of the others keeps some pixels.
    seen = own.segmenter.images
    assert len(seen) == images and set(np.diff(seen)) <= {1, 2}
    assert len(label) == len(seen) * (len(label) // len(seen)) and len(label) // len(seen) > 32


def test_the_choice_is_told_before_any_image_is_segmented(caplog, monkeypatch):
    monkeypatch.setattr(fitting, "EVIDENCE", 2**20)
    own = evaluator()
    with caplog.at_level(logging.INFO, "digseg_jax"):
        job._tell_fit(own, EStep(8, 2), split("val", 40))
    (line,) = caplog.messages
    assert "40 of 40 images of val" in line and "at most 262 of an image" in line and "1 MiB" in line
    assert not own.segmenter.images


def test_of_a_very_large_vocabulary_images_are_left_out():
    images, pixels = fitting.choose(split("val", 2975), 19, 8)
    assert len(images) == 2975 and pixels == 2**29 // (4 * (19 * 8 + 1)) // 2975
    images, pixels = fitting.choose(split("val", 2975), 847, 8)
    assert pixels >= fitting.LEAST and len(images) * pixels * 4 * (847 * 8 + 1) <= fitting.EVIDENCE
    steps = np.diff(images.rows)
    assert len(images) > 50 and images.rows[0] == 0 and steps.max() - steps.min() <= 1
