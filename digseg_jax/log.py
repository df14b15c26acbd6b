# SPDX-License-Identifier: Apache-2.0
"""This program's log lines, apart from those of the libraries (which share absl's logger)."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from absl import logging as absl_logging

log = logging.getLogger("digseg_jax")


class _StderrHandler(logging.StreamHandler):
    """Writes to what is `sys.stderr` when a line comes, which may change during a process."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignores the stream of `StreamHandler.__init__`: there is only one."""


def setup(*, quiet: bool = False) -> None:
    """Sends INFO lines (`quiet`: only warnings) to stderr, and the libraries' warnings."""
    # The libraries, then this program, whose lines must not reach absl's handler a second time.
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)

    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]

    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


@contextlib.contextmanager
def heartbeat(what: str, every: float = 60.0) -> Iterator[None]:
    """Logs a line every `every` seconds during silent work such as compiling."""
    done, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(every):
            log.info("%s, %.0f s so far", what, time.monotonic() - start)

    # A daemon, so that an error in the block does not keep the process alive.
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
