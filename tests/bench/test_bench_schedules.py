# SPDX-License-Identifier: Apache-2.0
"""The schedules' benchmark: rows of fewer members are parts of one sampling; a table of the report."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from digseg_jax.errors import UserError
from digseg_jax.report.sections import bench_tables
from digseg_jax.viz.templates import render_part
from tests.bench import schedules


def test_trained_weights_are_continued_at_a_lower_rate():
    fresh, further = (
        schedules.configuration("uniform", 0, 300, weights) for weights in (schedules.PRIOR, "DIR")
    )
    assert further.model.unet == "DIR" and further.optim.learning_rate < fresh.optim.learning_rate
    model = dataclasses.replace(further.model, unet=schedules.PRIOR)
    assert dataclasses.replace(further, model=model, optim=fresh.optim) == fresh


def test_only_the_diffusion_differs_between_schedules():
    first, *others = (schedules.configuration(name, 1, 9) for name in schedules.SCHEDULES)
    for other in others:
        assert other.diffusion != first.diffusion
        assert (other.data, other.optim, other.train) == (first.data, first.optim, first.train)
    with pytest.raises(UserError, match="'cosine'; legal: high_noise"):
        schedules.configuration("cosine", 0, 9)


def test_label_maps_are_those_of_the_members_mean_probability():
    evidence = np.random.default_rng(0).uniform(-1, 1, (3, 8, 4, 5))
    answer = SimpleNamespace(num_queries=3, scale=2.0, evidence=lambda q: evidence[q])
    maps = dict(schedules.label_maps(answer))
    assert {size: len(found) for size, found in maps.items()} == {1: 8, 4: 2, 8: 1}
    np.testing.assert_array_equal(maps[1][6], evidence[:, 6].argmax(axis=0))
    whole = (1 / (1 + np.exp(-2.0 * evidence))).mean(axis=1)
    np.testing.assert_array_equal(maps[8][0], whole.argmax(axis=0))
    last = (1 / (1 + np.exp(-2.0 * evidence[:, 4:]))).mean(axis=1)
    np.testing.assert_array_equal(maps[4][1], last.argmax(axis=0))


def test_its_file_is_a_table_of_the_report():
    def scores(members: float, steps: float) -> dict:
        names = [(size, count) for size in schedules.PARTS for count in schedules.STEPS]
        return {
            f"{e}x{s}": {"miou": 0.3 + members * (e > 1) + steps * (s > 1), "accuracy": 0.5}
            for e, s in names
        }

    runs = {"uniform": [scores(0.02, 0.0), scores(0.04, 0.0)]}
    facts = {"steps": 300, "seeds": [0, 1], "images": 24, "weights": "assets:segmenter"}
    table = schedules.as_table(facts | {"runs": runs})
    (row,) = table["rows"]
    assert "300 steps from assets:segmenter" in table["title"]
    assert row[0] == "uniform" and len(row) == len(table["columns"])
    np.testing.assert_allclose(
        row[-6:], [0.03, 0.02 * 0.5**0.5, 0.0, 0.0, 0.03, 0.02 * 0.5**0.5], atol=1e-9
    )
    assert "8x2 - 1x2" in render_part("report/sections.html.j2", "benches", bench_tables([table]))
