# SPDX-License-Identifier: Apache-2.0
"""The plan that is told before a training: what the evaluation after it will cost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
from experiments import get_config
from perfect import Reader

from digseg_jax.config.parse import parse
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import EvalConfig
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.plan import cost, masks_of_a_view, passes
from digseg_jax.segmentation.codecs import make_codec

SETTINGS = EvalConfig(ensemble=8, steps=2, exhaustive_limit=200, gate_limit=16)


@pytest.mark.parametrize(("classes", "masks"), [(150, 150 * 16), (847, 847 + 16 * 16)])
def test_masks_are_counted_as_the_evaluation_asks_for_them(folders, classes, masks):
    codec = make_codec("binary", tiny.config(folders).data)
    assert masks_of_a_view(SETTINGS, codec, classes) == masks


def test_names_that_share_a_mask_image_cost_it_once(folders):
    data = dataclasses.replace(tiny.config(folders).data, num_queries=32)
    prompted = make_codec("prompted", data)
    assert masks_of_a_view(SETTINGS, prompted, 30) == 16
    assert masks_of_a_view(SETTINGS, prompted, 150) == 5 + 16  # a coarse pass of five groups first


def test_the_cost_is_told_in_training_steps(folders):
    data = tiny.config(folders).data
    settings = dataclasses.replace(SETTINGS, split="test", num_images=10, calibrate=False)
    told = cost(settings, data, 4, make_codec("binary", data))
    masks = 10 * 8 * 16
    assert "10 images of 'test', 8 classes, 8 members x 2 steps: 1,280 passes" in told
    assert f"about {round(masks / (3 * 4 * data.num_queries))} training steps" in told


def test_calibrations_and_the_sweep_are_counted_too(cover):
    """The run of landcover.py takes 43,520 passes; the plan told 2,592, those of the headline."""
    config = parse(get_config("landcover"))
    codec = make_codec("binary", config.data)
    told = cost(config.eval, config.data, config.train.batch_size, codec)
    images = len(cover.tiles("test")), len(cover.tiles("val"))
    assert sum(images) * 8 * (4 + 1 + 2 + 8 + 16 + 1 + 8) == 43_520
    assert "6 more E-Steps and a calibration of each on 55 images: 43,520 passes" in told


class Counting(Reader):
    """Counts the masks that are denoised, steps too."""

    def __init__(self):
        super().__init__(lambda image, query: image[..., 0].astype(np.float32) / 255)
        self.passes = 0

    def segment(self, requests, estep, **options):
        self.passes += sum(
            estep.ensemble * estep.steps * len(r.queries) * len(r.templates) for r in requests
        )
        return super().segment(requests, estep, **options)


def test_templates_and_a_threshold_search_are_counted_as_they_are_asked(folders):
    data = tiny.config(folders).data
    settings = dataclasses.replace(SETTINGS, templates=("{}", "a photo of {}"), sweep=("1x1",))
    picture = {"image": np.zeros((8, 8, 3), np.uint8), "label": np.zeros((8, 8), np.int32), "name": ""}
    classes, own = ("ground", "road"), ((0,), (1,))
    made = {
        split: EvalExamples([picture] * n, split, tuple(range(n)), classes, own, "foreground")
        for split, n in (("test", 3), ("train", 40))
    }
    reader = Counting()
    evaluator = Evaluator(reader, made["test"], settings, seed=0)
    for text in ("8x2", "1x1"):
        evaluator.scores(EStep.parse(text))
    evaluator.threshold_counts(EStep(8, 2), made["train"])
    codec = make_codec("binary", data)
    told = passes(settings, data, codec, made["test"], searched=made["train"])
    assert told == reader.passes == 3 * 2 * 2 * 17 + 30 * 2 * 16
