# SPDX-License-Identifier: Apache-2.0
"""Remembers Ctrl-C, because Python drops a KeyboardInterrupt that is raised in the wrong place."""

from __future__ import annotations

import signal
import threading
from typing import Any

_remembered = False


def remember_interrupts() -> None:
    """Makes Ctrl-C leave a mark beside raising KeyboardInterrupt.

    While libraries load, an exception may be raised in a callback of C code or in a destructor, where
    it is printed or lost, and the program continues. `check_interrupts` raises it once more.
    """
    global _remembered
    _remembered = False

    # Python accepts signal handlers in the main thread only.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _remember)


def check_interrupts() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed before; call it between steps of a long start."""
    if _remembered:
        raise KeyboardInterrupt


def _remember(*_: Any) -> None:
    """Handles SIGINT as Python does, and leaves the mark."""
    global _remembered
    _remembered = True
    raise KeyboardInterrupt
