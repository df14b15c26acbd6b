# SPDX-License-Identifier: Apache-2.0
"""Curves and axes of the training charts."""

from __future__ import annotations

import itertools

import pytest

from digseg_jax.report.chart import linear_ticks, log_ticks, loss_chart, miou_chart, smooth, thin
from digseg_jax.report.circumstances import training_hours


def test_curves_keep_their_ends_and_constants():
    line = [(i, 2.0) for i in range(1000)]
    assert smooth(line)[500] == pytest.approx((500, 2.0))
    kept = thin(1000)
    assert kept[0] == 0 and kept[-1] == 999 and len(kept) <= 401
    assert thin(3) == [0, 1, 2] and thin(0) == []


def test_a_logarithmic_axis_has_round_values():
    assert log_ticks(0.009, 1.2) == [0.01, 0.1, 1.0]
    assert log_ticks(0.2, 3.5) == [0.3, 1.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high"), [(0.21, 0.28), (0.031, 0.049), (0.49, 0.51), (1e-12, 1.05e-12), (3e6, 3.2e6)]
)
def test_a_plateau_has_ticks_too(low, high):
    ticks = log_ticks(low, high)
    assert len(ticks) >= 3 and len({f"{tick:g}" for tick in ticks}) == len(ticks)
    assert all(low * (1 - 1e-6) <= tick <= high * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize("last", [1, 2, 3, 4, 7, 30, 4000])
def test_steps_are_whole_numbers_none_of_which_repeats(last):
    chart = miou_chart([{"step": step, "val_miou": 0.5} for step in (1, last)])
    told = [int(text.replace(",", "")) for _, text in chart.steps]
    assert len(set(told)) == len(told) and told[0] >= 1 and told[-1] <= last
    if last > 1:
        where = [x for x, _ in chart.steps]
        apart = [b - a for a, b in itertools.pairwise(where)]
        assert apart == pytest.approx([apart[0]] * len(apart))


def test_other_axes_may_be_divided():
    assert linear_ticks(0, 0.55, 4) == [0.0, 0.2, 0.4]
    assert linear_ticks(0, 0.003, 4) == [0.0, 0.001, 0.002, 0.003]


def test_a_step_that_was_logged_twice_is_no_error():
    """The smoothed curve may end as it goes on, the raw one not: both keep the same points."""
    lines = [{"step": step, "loss": 0.5 + 0.1 * (step % 3)} for step in range(1, 1001)]
    for extra in (lines[-1], lines[-1] | {"loss": 0.9}, lines[-2]):
        chart = loss_chart([*lines, extra])
        raw, mean = (path.count("L") for _, path in chart.curves)
        assert raw == mean


def test_steps_that_were_trained_again_take_their_time_once():
    pairs = ((10, 2.0), (20, 2.0), (10, 1.0), (20, 4.0), (30, 2.0))
    lines = [{"step": step, "images_per_second": speed} for step, speed in pairs]
    assert training_hours(lines, {"train": {"batch_size": 8}}) == pytest.approx(30 * 8 / 2 / 3600)
