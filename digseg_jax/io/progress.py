# SPDX-License-Identifier: Apache-2.0
"""Progress line of a long job: how far it is, its rate, and the estimated time until it ends."""

from __future__ import annotations

import io
import math
import shutil
import sys
import time
from collections.abc import Callable

import jax


def format_duration(seconds: float) -> str:
    """Formats seconds as `2:31`, or `1:02:31` from an hour on; `-:--` if not finite."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Progress:
    """A progress line such as `step 120/1000  loss 0.0123  38.2 images/s  ETA 2:31`.

    On a terminal it is redrawn in place; elsewhere it is a plain line at most every `every` seconds.
    The ETA counts from the first update on, so that compilation does not distort it.

    Args:
      total: number of the last step.
      label: word before the step.
      unit: what `rate` counts.
      every: seconds between plain lines.
      stream: stderr by default.
      active: whether this process shows it; by default only JAX process 0 does.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str = "step",
        unit: str = "images",
        every: float = 10.0,
        stream: io.TextIOBase | None = None,
        active: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self._active = jax.process_index() == 0 if active is None else active

        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._gap = 0.1 if self._tty else every  # seconds between redrawn or printed lines

        self._clock = clock
        self._origin: tuple[float, int] | None = None  # time and step of the first update
        self._shown = -math.inf  # time of the last line; none yet
        self._line, self._pending = "", False  # the latest line, and whether it waits to be shown

    def update(self, step: int, rate: float | None = None, **values: float) -> None:
        """Shows `step` of the total, `rate` in units per second, and values such as the loss."""
        if not self._active:
            return

        now = self._clock()
        if self._origin is None:
            self._origin = (now, step)

        # The line is kept even when it is too early to show it, so that `close` can show the last one.
        self._line = self._format(step, rate, values, now)
        self._pending = True
        if now - self._shown >= self._gap:
            self._show(now)

    def clear(self) -> None:
        """Erases the line on a terminal, so that another message can be written in its place."""
        if self._active and self._tty and self._line:
            self._write("\r\x1b[K")

    def close(self) -> None:
        """Shows the last state and ends the line."""
        if self._active and self._pending:
            self._show(self._clock())
        if self._active and self._tty and self._line:
            self._write("\n")
        self._line = ""

    def _format(self, step: int, rate: float | None, values: dict[str, float], now: float) -> str:
        """The line's text; the remaining time is extrapolated from the speed since the first update."""
        # No estimate at the first update, nor while no step has been made since.
        start, first = self._origin or (now, step)
        left = (now - start) / (step - first) * (self.total - step) if step > first else math.inf

        parts = [f"{self.label} {step}/{self.total}"]
        parts += [f"{name} {float(value):.4g}" for name, value in values.items()]
        if rate is not None:
            parts.append(f"{float(rate):.1f} {self.unit}/s")
        parts.append(f"ETA {format_duration(0.0 if step >= self.total else left)}")
        return "  ".join(parts)

    def _show(self, now: float) -> None:
        """Writes the line: over the old one on a terminal, else below it."""
        if self._tty:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be redrawn
            self._write(f"\r{self._line[:width]}\x1b[K")
        else:
            self._write(self._line + "\n")
        self._shown, self._pending = now, False

    def _write(self, text: str) -> None:
        """Writes to the stream; never again once nobody reads it (a session that was closed)."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a broken pipe; a closed file
            self._active = False
