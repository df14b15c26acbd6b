# SPDX-License-Identifier: Apache-2.0
"""The one exception type for what a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Exit statuses of `main`; the scripts of launch/ start a run again after PREEMPTED alone.
USER_ERROR = 2
OVER_BUDGET = 3  # --mode=compile: the program does not fit the devices
PREEMPTED = 75  # sysexits' EX_TEMPFAIL: saved, and the same command goes on from there


class UserError(ValueError):
    """Bad input: the message names the thing, the place and the legal values, in one line.

    `main` prints it without a traceback and exits with status USER_ERROR.
    """


class Preempted(Exception):
    """The machine wants its processes back; everything is saved. `main` exits with PREEMPTED."""


def nearest(name: str, legal: Iterable[str], n: int = 3) -> str:
    """Returns a hint such as `; did you mean 'a', 'b'?`, or an empty string."""
    close = difflib.get_close_matches(name, list(legal), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
