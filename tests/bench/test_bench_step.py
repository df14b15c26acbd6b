# SPDX-License-Identifier: Apache-2.0
"""The benchmark of one full-size step, here with a tiny model."""

from __future__ import annotations

import math

import pytest
import tiny

from digseg_jax.errors import UserError
from tests.bench import step


@pytest.mark.slow
def test_a_step_moves_every_parameter_and_says_what_it_needs():
    result = step.run(32, "float32", ema=True, unet=tiny.UNET, vae=tiny.VAE)
    assert math.isfinite(result["loss"]) and result["unmoved"] == []
    assert result["parameters"] > 10_000 and result["parameter_arrays"] > 100
    # parameters, average and two moments are the least that it holds
    assert result["needed_gb"] >= round(4 * 4 * result["parameters"] / 1e9, 2)
    assert result["peak_gb"] > 0 and result["tflops"] >= 0


def test_a_step_that_does_not_fit_says_by_how_much():
    with pytest.raises(UserError, match=r"needs 1000000.0 GB, \d+\.\d GB more than is available"):
        step.check_room(10**15)
    step.check_room(1)
