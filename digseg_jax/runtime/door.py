# SPDX-License-Identifier: Apache-2.0
"""Ends every command: turns what it raised into one line and an exit status."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Callable

from digseg_jax.errors import (
    CRASH,
    INTERRUPTED,
    OVER_BUDGET,
    PREEMPTED,
    USER_ERROR,
    DoesNotFit,
    Preempted,
    Transient,
    UserError,
    lacks_memory,
    passes,
    without_secrets,
)
from digseg_jax.log import log

# Errors of a disk that need not name a file, as some writers know only its descriptor.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def tell(error: BaseException) -> int:
    """Prints what a command raised, in one line if the user can fix it; returns the exit status."""
    # Ends that are not failures of the program.
    if isinstance(error, Transient):
        return _one_line(f"{error}; this is temporary: start the same command again", PREEMPTED)
    if isinstance(error, UserError):
        return _one_line(str(error), OVER_BUDGET if isinstance(error, DoesNotFit) else USER_ERROR)
    if isinstance(error, Preempted):
        log.info("%s; the same command continues from there", error)
        return PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return _one_line("interrupted", INTERRUPTED)

    # In the middle of a step or a transfer, the libraries' own errors arrive here.
    if passes(error):
        why = f"another process of the run, or a service, does not answer ({error})"
        return _one_line(f"{why[:600]}; this is temporary: start the same command again", PREEMPTED)

    # An error of a disk or a path is not a defect of the program, whatever its errno.
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _one_line(f"{error.filename}: {error.strerror}", USER_ERROR)
    if isinstance(error, OSError) and error.errno in _OF_DISKS:
        return _one_line(f"a file cannot be written: {error.strerror}", USER_ERROR)

    # The rest is for a developer: a traceback, and a hint where memory ran out.
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
    if lacks_memory(error):
        return _one_line("out of memory: take smaller batches or a larger device", OVER_BUDGET)
    return CRASH


def run_tool(job: Callable[[], int | None]) -> int:
    """Runs the job of a command of `tools`; returns the exit status, 0 where the job returns none."""
    # File names that are not UTF-8 must not stop a listing: print them with escapes.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    try:
        return job() or 0
    except (Exception, Preempted, KeyboardInterrupt) as error:
        return tell(error)


def _one_line(text: str, status: int) -> int:
    """Prints an error in one line, and returns the exit status that goes with it."""
    with contextlib.suppress(OSError):
        print(f"error: {without_secrets(' '.join(text.split()))}", file=sys.stderr)
    return status
