# SPDX-License-Identifier: Apache-2.0
"""Turns SIGTERM into a request: after which step all processes save and leave.

Of several processes, each may get the signal at another step, or only one of them; JAX's coordination
service, which handles SIGTERM from the start, then finds the first step that all can still reach. A
process on its own needs no agreement.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class PreemptionWatch:
    """A context manager around the training loop; outside of it SIGTERM ends the process."""

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> PreemptionWatch:
        # Python accepts signal handlers in the main thread only.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        """Signal handler: remembers the request until the step is done."""
        self._asked = True

    def reached(self, step: int) -> bool:
        """True if all processes save and leave after `step`; each must call it after every step."""
        if self._alone:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
