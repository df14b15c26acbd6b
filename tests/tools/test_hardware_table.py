# SPDX-License-Identifier: Apache-2.0
"""The table of what experiments need on which hardware."""

from __future__ import annotations

from functools import partial

import jax
import pytest
import tiny

from digseg_jax.aot import programs
from digseg_jax.aot.shapes import Architecture
from digseg_jax.errors import UserError
from digseg_jax.runtime.hardware import CHIPS
from digseg_jax.tools.hardware_table import BEGIN, END, Counter, Needs, insert
from digseg_jax.training.flops import step_flops
from digseg_jax.training.setup import set_up


def test_time_and_memory_are_those_of_the_run(folders):
    config = tiny.config(folders, train__steps=10, train__batch_size=8, eval__split="test")
    parts = Architecture.of(config.model)

    def needs_on(counter, count):
        build = partial(programs.abstract_task, architecture=parts)
        setup = set_up(config, build, counter.machine("a100", count))
        return counter.needs(build(setup.config), parts, setup.mesh, "a100")

    counter = Counter(jax.devices())
    needs = needs_on(counter, 1)
    task = programs.abstract_task(config, parts)
    flops = step_flops(task, programs.train_batch(task, parts, 8))
    assert needs.training == pytest.approx(10 * flops / CHIPS["a100"].flops)
    assert needs.budget == 0.9 * CHIPS["a100"].hbm_bytes and needs.microbatches == 1

    # Two chips halve the time, and a second look counts nothing again.
    counter._known |= dict.fromkeys(counter._known, 0.0)
    assert needs_on(counter, 1).training == 0.0
    two = needs_on(Counter(jax.devices()), 2)
    assert two.evaluation == pytest.approx(needs.evaluation / 2) and two.memory < needs.memory


def test_a_cell_says_what_fits_and_in_how_many_parts():
    assert str(Needs(20e9, 36e9, 8, 7200.0, 900.0)) == "20.0 GB in 8 parts, 2 + 0.25 h"
    assert str(Needs(40e9, 36e9, 8, 7200.0, 900.0)) == "40.0 of 36.0 GB"


def test_the_table_goes_between_its_marks():
    assert insert("new\n", f"a{BEGIN}old{END}b") == f"a{BEGIN}\nnew\n{END}b"
    with pytest.raises(UserError, match="no place for the table"):
        insert("new", f"a{END}b{BEGIN}")
