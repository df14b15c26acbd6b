# SPDX-License-Identifier: Apache-2.0
"""No biases are fitted among names that never compete: more of them than one mask image shows."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from perfect import Reader

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import EvalConfig
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.segmentation.prompted import PromptedCodec


def evaluator(names: int, classes: int, limit: int = 200) -> Evaluator:
    """An evaluator of the prompted codec with so many colors."""
    codec = PromptedCodec(names)
    codec.assume_colors(names + 1, 4)
    facts = SimpleNamespace(
        classes=tuple(f"c{i}" for i in range(classes)), asked=range(classes), split="test",
        template="{}", inference="whole", absent="mmseg", covers=(), rest=-1,
    )  # fmt: skip
    reader = Reader(lambda image, query: np.zeros((8, 8)), codec=codec)
    return Evaluator(reader, facts, EvalConfig(exhaustive_limit=limit), seed=0)


class Val:
    """Images of a split that is not scored, which nobody may look at."""

    split = "val"

    def __len__(self):
        return 2

    def evenly(self, count):
        return self

    def __getitem__(self, index):
        raise AssertionError("an image was read")


@pytest.mark.parametrize(("names", "limit"), [(3, 200), (8, 4)])
def test_what_is_not_asked_for_together_is_not_calibrated(names, limit, caplog):
    made = evaluator(names, 5, limit)
    assert made.protocol == "gated"
    with caplog.at_level(logging.INFO, "digseg_jax"):
        found = made.calibrate(EStep(2, 1), Val())
    assert found.bias == (0.0,) * 5 and (found.scale, found.split) == (2.0, "none")
    assert caplog.text.count("no calibration of 2x1") == 1 and made.segmenter.asked == 0


def test_what_is_asked_for_together_is():
    made = evaluator(8, 5)
    with pytest.raises(AssertionError, match="an image was read"):
        made.calibrate(EStep(2, 1), Val())
