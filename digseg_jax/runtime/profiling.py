# SPDX-License-Identifier: Apache-2.0
"""Measures a run's speed and shares of time; profiler window."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from digseg_jax.log import log
from digseg_jax.runtime.hardware import chip_of

ACTIVITIES = ("data", "checkpoint", "eval")  # the rest of the time is the step's


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None for an unknown kind, such as a CPU."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops


def speed(flops: float, seconds: float, devices: list[jax.Device]) -> dict[str, float]:
    """{"flops_per_second"}, with "mfu", the share of the devices' peak, if the peak is known.

    Args:
      flops: of the model as it is written (`digseg_jax.training.flops`); what a program recomputes or
        runs in a kernel does not change them.
      seconds: that these FLOPs took.
      devices: all devices of the run, of one kind.
    """
    values = {"flops_per_second": flops / seconds}
    peak = peak_flops(devices[0].device_kind)
    if peak is not None:
        values["mfu"] = values["flops_per_second"] / (peak * len(devices))
    return values


class Stopwatch:
    """Shares of the wall time between two readings: `with watch("data"): ...`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._since = clock, clock()
        self._spent = dict.fromkeys(ACTIVITIES, 0.0)

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Counts the time of the block as `activity`."""
        start = self._clock()
        yield
        self._spent[activity] += self._clock() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and {"time_data": share, ..., "time_step": the rest}.

        The host runs ahead of the devices, so their work while it waits for data or writes a checkpoint
        is hidden there, not counted twice.
        """
        now = self._clock()
        # At least a nanosecond, because the shares divide by it.
        seconds = max(now - self._since, 1e-9)

        shares = {f"time_{name}": spent / seconds for name, spent in self._spent.items()}
        shares["time_step"] = max(1.0 - sum(shares.values()), 0.0)

        self._since, self._spent = now, dict.fromkeys(ACTIVITIES, 0.0)
        return seconds, shares


class ProfilerWindow:
    """A trace of the steps first..last (config.logging.profile), for TensorBoard or Perfetto.

    steps: (first, last), counted from 1; () for no trace.
    folder: where the trace is written.
    """

    def __init__(self, steps: tuple[int, ...], folder: str):
        self.first, self.last = steps or (0, 0)  # no step is 0, so (0, 0) never starts
        self.folder, self.active = folder, False

    def before(self, step: int) -> None:
        """Begins the trace if `step` is the first of the window."""
        if step == self.first:
            jax.profiler.start_trace(self.folder)
            self.active = True

    def after(self, step: int, result: Any) -> None:
        """Ends the trace after the window's last step, once its `result` is computed."""
        if self.active and step == self.last:
            # Steps run asynchronously: without waiting, the trace would end before the device's work.
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self.active:
            jax.profiler.stop_trace()
            self.active = False
            log.info("profile of steps %d to %d: %s", self.first, self.last, self.folder)
