# SPDX-License-Identifier: Apache-2.0
"""Remembers Ctrl-C and SIGTERM, because Python drops exceptions that are raised in the wrong place."""

from __future__ import annotations

import signal
import threading
from typing import Any

from digseg_jax.errors import Preempted

_remembered: BaseException | None = None


def remember_interrupts() -> None:
    """Makes Ctrl-C and SIGTERM leave a mark beside raising KeyboardInterrupt or `Preempted`.

    While libraries load, an exception may be raised in a callback of C code or in a destructor, where
    it is printed or lost, and the program continues. `check_interrupts` raises it once more. During the
    training loop, `preemption` takes the place of both.
    """
    global _remembered
    _remembered = None

    # Python accepts signal handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _remember)
        signal.signal(signal.SIGTERM, _remember)


def check_interrupts() -> None:
    """Raises what a signal has raised before; call it between steps of a long start."""
    if _remembered is not None:
        raise _remembered


def _remember(number: int, _: Any) -> None:
    """Handles Ctrl-C as Python does, and SIGTERM as a request to start again; leaves the mark."""
    global _remembered
    asked = Preempted("preempted outside of the training loop: what was saved is there")
    _remembered = KeyboardInterrupt() if number == signal.SIGINT else asked
    raise _remembered
