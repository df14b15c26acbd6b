# SPDX-License-Identifier: Apache-2.0
"""Turns SIGTERM, Ctrl-C and their like into a request: after which step all processes save and leave.

Of several processes, each may get the signal at another step, or only one of them; JAX's coordination
service, which handles SIGTERM from the start, then finds the first step that all can still reach. A
process on its own needs no agreement.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from digseg_jax.errors import Preempted
from digseg_jax.log import log
from digseg_jax.runtime.interrupts import check_interrupts

# A closed terminal, SLURM's early warning as many scripts ask for it, and a limit of processor time.
ALIKE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)

# Of the points at which the processes could leave so far. JAX asks for numbers that grow, and takes the
# one after the last when the signal came: no number may be left out.
_number = 0
_watched = False  # whether a training loop is running, which leaves at its own steps
_late = False  # whether a training loop was asked to leave after its last step, and so ended as usual


def leave_if_asked() -> None:
    """Lets a run leave between two pieces of work outside the training loop, such as an evaluation's.

    Of several processes, each must call it equally often: JAX's coordination service, which takes
    SIGTERM away from Python, chooses a call that all of them reach. Within a training loop it does
    nothing: there the step decides. Whoever was asked during the last step leaves here.

    Raises:
      Preempted: on every process; or what a signal has raised before on a process of its own.
    """
    check_interrupts()
    if not _watched and (_late or _all_asked()):
        forget_late_request()
        raise Preempted("preempted outside of the training loop: what was saved is there")


def forget_late_request() -> None:
    """Forgets that a training loop was asked to leave in its last step: its job is over.

    In a Python session, another job may follow in the same process.
    """
    global _late
    _late = False


def _all_asked() -> bool:
    """Whether several processes have agreed to leave at this point, which all of them must reach."""
    global _number
    if jax.process_count() == 1:
        return False
    _number += 1
    return multihost_utils.reached_preemption_sync_point(_number)


class PreemptionWatch:
    """A context manager around the training loop; see `leave_if_asked` for what lies outside of it."""

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> PreemptionWatch:
        global _watched, _late
        check_interrupts()
        _watched, _late = True, False

        # Python accepts signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            for number in ALIKE:  # but nohup's, which are to be ignored
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._like_sigterm)
            if self._alone:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        global _watched, _late
        _watched, _late = False, self._asked and kind is None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: Any) -> None:
        """Signal handler: remembers the request until the step is done."""
        self._asked = True

    def _like_sigterm(self, number: int, _: Any) -> None:
        """Signal handler: the same request by another signal."""
        log.warning("%s: saving after this step", signal.Signals(number).name)
        self._ask()

    def _interrupt(self, *_: Any) -> None:
        """Handles the first Ctrl-C as SIGTERM; the second one interrupts at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.warning("Ctrl-C: saving after this step; press it again to leave without saving")
        self._ask()

    def _ask(self) -> None:
        """Asks all processes to leave: the coordination service of several listens to SIGTERM only."""
        if self._alone:
            self._asked = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """True if all processes save and leave after this step; each must call it after every step."""
        if not self._alone:
            self._asked = _all_asked()
        return self._asked
