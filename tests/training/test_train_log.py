# SPDX-License-Identifier: Apache-2.0
"""What the log of a training tells beside its metrics."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from digseg_jax.config.schema import TrainConfig
from digseg_jax.training.train_log import TrainLog


@pytest.mark.parametrize(
    ("stats", "memory"),
    [
        (
            {"peak_bytes_in_use": 3.2e9, "bytes_limit": 16e9},
            "; a device had at most 3.2 of 16.0 GB in use",
        ),
        (None, ""),
    ],
)
def test_the_second_line_tells_when_the_last_step_is_due(caplog, stats, memory):
    caplog.set_level(logging.INFO, "digseg_jax")
    writer = SimpleNamespace(write=lambda step, values: None)
    device = SimpleNamespace(memory_stats=lambda: stats, process_index=0)
    log = TrainLog(TrainConfig(steps=100, batch_size=8), writer, [device])
    log.watch = SimpleNamespace(read=lambda: (4.0, {}))
    for step in range(1, 31):
        log.add(step, {"loss": 0.5, "grad_norm": 1.0})
        if step % 10 == 0:
            log.write(step, {})

    # 80 steps left after the second line, of 0.4 s each
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the last step is due in 0:32, at 20") and line.endswith(memory)
    assert memory or line[-3] == ":"
