# SPDX-License-Identifier: Apache-2.0
"""The one way out of every command: what it raised becomes one line and an exit status."""

from __future__ import annotations

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
    Preempted,
    UserError,
    lacks_memory,
)
from digseg_jax.log import log

# what a disk or a path refuses: no defect of the program
_REFUSED = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
    errno.ENOENT, errno.ENAMETOOLONG,
)  # fmt: skip


def tell(error: BaseException) -> int:
    """Prints what a command raised, in one line if a user can put it right; returns the exit status."""
    if isinstance(error, UserError):
        return _one_line(str(error), USER_ERROR)
    if isinstance(error, Preempted):
        log.info("%s; the same command goes on from there", error)
        return PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return _one_line("interrupted", INTERRUPTED)
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename is not None:
        return _one_line(f"{error.filename}: {error.strerror}", USER_ERROR)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return _one_line(f"a file cannot be written: {error.strerror}", USER_ERROR)

    traceback.print_exception(error)
    if lacks_memory(error):
        return _one_line("out of memory: take smaller batches or a larger device", OVER_BUDGET)
    return CRASH


def run_tool(job: Callable[[], int | None]) -> int:
    """Runs the job of a command of `tools`; returns the exit status, 0 where the job returns none."""
    # Names that are not UTF-8 can be printed: a listing must not end at one.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return job() or 0
    except (Exception, KeyboardInterrupt) as error:
        return tell(error)


def _one_line(text: str, status: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status
