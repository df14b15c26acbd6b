# SPDX-License-Identifier: Apache-2.0
"""Exceptions for what a user can put right, and the program's exit statuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit statuses of `main`, beside 0; only after PREEMPTED do the scripts of launch/ start a run again. A
# process that is aborted because another one of its run ended has 134.
CRASH = 1
USER_ERROR = 2  # refused, with one line that says why
OVER_BUDGET = 3  # does not fit: a program of --mode=compile, or a device's or the host's memory
INTERRUPTED = 130  # Ctrl-C where nothing is to be saved: 128 + SIGINT, as shells have it
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command goes on from there


class UserError(ValueError):
    """Bad input: the message names the thing, the place and the legal values, in one line.

    `main` prints it without a traceback and exits with status USER_ERROR.
    """


class Preempted(Exception):
    """The machine wants its processes back; everything is saved. `main` exits with PREEMPTED."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has not enough memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def nearest(name: str, legal: Iterable[str], n: int = 3) -> str:
    """A hint such as `; did you mean 'a', 'b'?`, or "" if no legal name is similar."""
    close = difflib.get_close_matches(name, list(legal), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
