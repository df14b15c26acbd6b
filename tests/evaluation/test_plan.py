# SPDX-License-Identifier: Apache-2.0
"""The plan that is told before a training: what the evaluation after it will cost."""

from __future__ import annotations

import pytest

from digseg_jax.config.parse import default, parse, with_settings
from digseg_jax.evaluation.plan import _evaluation, unet_calls
from digseg_jax.segmentation.codecs import make_codec


@pytest.mark.parametrize(("classes", "calls"), [(150, 150 * 16), (847, 847 + 16 * 16)])
def test_masks_are_counted_as_the_evaluation_asks_for_them(classes, calls):
    settings = {
        "eval.ensemble": 8,
        "eval.steps": 2,
        "eval.exhaustive_limit": 200,
        "eval.gate_limit": 16,
    }
    config = with_settings(parse(default()), settings | {"eval.split": "val"})
    codec = make_codec("binary", config.data)
    assert unet_calls(config, codec, classes) == calls

    told = _evaluation(config, codec, 2_000, classes)
    step = 3 * config.train.batch_size * config.data.num_queries
    assert f"2,000 images of 'val', {classes} classes, 8 members x 2 steps" in told
    assert f"{2_000 * calls:,} masks" in told and f"of {round(2_000 * calls / step):,} training" in told
