# SPDX-License-Identifier: Apache-2.0
"""Our own log lines, apart from the chatter of the libraries (which share absl's logger)."""

from __future__ import annotations

import logging
import sys

from absl import logging as absl_logging

log = logging.getLogger("digseg_jax")


def setup(*, quiet: bool = False) -> None:
    """Sends INFO lines (`quiet`: only warnings) to stderr, and libraries' only from warnings on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
