# SPDX-License-Identifier: Apache-2.0
"""Speed and shares of time."""

from __future__ import annotations

import types

import jax
import pytest

from digseg_jax.runtime.profiling import Stopwatch, peak_flops, speed


def test_shares_of_time_sum_to_one_and_start_anew_after_a_reading():
    now = [0.0]
    watch = Stopwatch(lambda: now[0])

    def spend(activity, seconds):
        with watch(activity):
            now[0] += seconds

    spend("data", 1.0)
    now[0] += 5.0
    spend("checkpoint", 0.5)
    spend("eval", 2.5)
    spend("data", 1.0)
    seconds, shares = watch.read()
    assert seconds == 10.0
    assert shares == {"time_data": 0.2, "time_checkpoint": 0.05, "time_eval": 0.25, "time_step": 0.5}
    now[0] += 2.0
    assert watch.read() == (2.0, {"time_data": 0.0, "time_checkpoint": 0.0, "time_eval": 0.0,
                                  "time_step": 1.0})  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),  # not v5p, whose name is the start of it
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),  # not an L4, whose name is the start of it
        ("Tesla T4", 8.1e12),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_the_peak_is_that_of_the_device(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_is_the_share_of_all_devices_peak():
    chips = [types.SimpleNamespace(device_kind="TPU v4")] * 4
    got = speed(275e12, 0.5, chips)
    assert got == {"flops_per_second": 550e12, "mfu": 0.5}
    assert "mfu" not in speed(1.0, 1.0, jax.devices())
