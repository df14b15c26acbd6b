# SPDX-License-Identifier: Apache-2.0
"""The training loop's log: means of the step metrics, speed, shares of time, and the NaN guard."""

from __future__ import annotations

import datetime
from typing import Any

import jax
import numpy as np

from digseg_jax.arraytypes import Array
from digseg_jax.config.schema import TrainConfig
from digseg_jax.errors import UserError
from digseg_jax.io.metric_writer import MetricWriter
from digseg_jax.io.progress import Progress, format_duration
from digseg_jax.log import log
from digseg_jax.runtime.profiling import Stopwatch, speed

GUARDED = ("loss", "grad_norm")  # metrics that must be finite for the run to continue


class NotFinite(UserError):
    """A step whose loss or gradient norm is not finite; the same command would meet it again.

    advice: what is saved, and what to change.
    """

    def __init__(self, step: int, metrics: dict[str, float], advice: str = ""):
        self.step, self.metrics = step, metrics
        values = ", ".join(f"{name} {metrics[name]}" for name in GUARDED)
        super().__init__(f"{values} at step {step}{advice}")


class TrainLog:
    """Collects step metrics on the device and fetches them once per logged line.

    Set `flops` to the model's FLOPs of one step to have FLOP/s and MFU logged as well.
    """

    def __init__(self, config: TrainConfig, writer: MetricWriter, devices: list[jax.Device]):
        self.config, self.devices, self.flops = config, devices, 0.0
        self.writer = writer
        self.progress = Progress(config.steps)
        self.lines = 0  # written so far

        # Metrics that are still on the devices, and those fetched since the last line.
        self.pending: list[tuple[int, dict[str, Array]]] = []
        self.fetched: list[dict[str, float]] = []
        self.watch = Stopwatch()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Keeps a step's metrics on the device; fetching them here would make every step wait."""
        self.pending.append((step, metrics))

    def check(self) -> None:
        """Waits for the steps so far and fetches their metrics.

        Raises:
          NotFinite: for the first step whose loss or gradient norm is not finite; its metrics are
            logged.
        """
        steps, metrics = zip(*self.pending, strict=True) if self.pending else ((), ())
        self.pending = []

        # One transfer for all steps; then every step is judged, so that the first bad one is named.
        for step, values in zip(steps, jax.device_get(metrics), strict=True):
            row = {name: float(value) for name, value in values.items()}
            if not np.isfinite([row[name] for name in GUARDED]).all():
                self.writer.write(step, row)
                raise NotFinite(step, row)
            self.fetched.append(row)

    def write(self, step: int, extra: dict[str, float]) -> None:
        """Writes one line of means over the steps since the last; raises what `check` raises.

        Args:
          step: the step that the line is of.
          extra: metrics of an evaluation at this step, written as they are.
        """
        self.check()
        mean = {k: float(np.mean([row[k] for row in self.fetched])) for k in self.fetched[0]}
        mean = with_part_losses(mean)

        # Speed over the wall time, evaluation and saving included; their shares stand beside it.
        seconds, shares = self.watch.read()
        steps = len(self.fetched)
        mean["images_per_second"] = steps * self.config.batch_size / seconds
        if self.flops:
            mean |= speed(steps * self.flops, seconds, self.devices)

        self.writer.write(step, mean | shares | extra)
        known = {name: value for name, value in extra.items() if np.isfinite(value)}
        self.progress.update(step, mean["images_per_second"], loss=mean["loss"], **known)
        self.fetched = []

        # The first line's time includes the compilation.
        self.lines += 1
        if self.lines == 2 and step < self.config.steps:
            self.progress.clear()
            log.info("%s", self._expected(step, mean["images_per_second"]))

    def _expected(self, step: int, rate: float) -> str:
        """When the last step is due at `rate` images per second, and the memory that a device takes."""
        seconds = (self.config.steps - step) * self.config.batch_size / rate
        due = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        line = f"the last step is due in {format_duration(seconds)}, at {due:%Y-%m-%d %H:%M}"

        # A process can query only its own devices, and CPUs report nothing.
        own = next(d for d in self.devices if d.process_index == jax.process_index())
        stats = own.memory_stats() or {}
        if "peak_bytes_in_use" in stats and "bytes_limit" in stats:
            used, limit = (stats[key] / 1e9 for key in ("peak_bytes_in_use", "bytes_limit"))
            line += f"; a device had at most {used:.1f} of {limit:.1f} GB in use"
        return line

    def leave(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Closes the files, as `__exit__` would; `Record.leave` says what an exception changes."""
        self.progress.close()
        self.writer.__exit__(kind, None, None)


def with_part_losses(mean: dict[str, float]) -> dict[str, float]:
    """Divides each part's share of the loss by its share of the examples: "loss/NAME".

    A part that no example came from has no loss.
    """
    found = {}
    for key, value in mean.items():
        kind, _, name = key.partition("/")
        if kind != "part_loss":
            found[key] = value
        elif share := mean[f"share/{name}"]:
            found[f"loss/{name}"] = value / share
    return found
