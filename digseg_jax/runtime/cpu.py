# SPDX-License-Identifier: Apache-2.0
"""The host's memory, and start-up settings for CPU back ends: call `tune` before JAX is imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from pathlib import Path

from digseg_jax.log import log

# XLA hands groups of operations to YNNPACK by default; on this project's U-Net that costs
# a third of the step (two cores, jaxlib 0.10: 673 ms with, 469 ms without). An unknown
# flag aborts the process, so it is set only for the versions that it was tried with.
FLAG = "--xla_cpu_experimental_ynn_fusion_type="
TRIED = ("0.10.", "0.12.")  # jaxlib versions


def tune() -> None:
    """Turns YNNPACK's fusions off by an XLA flag, unless the user has set that flag.

    For an untried jaxlib it only logs a line.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG.rstrip("=") in flags:
        return

    version = importlib.metadata.version("jaxlib")
    if version.startswith(TRIED):
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
    else:
        log.info(
            "jaxlib %s: %s, which CPUs need for speed, is left out: it is known to work with %s only",
            version,
            FLAG,
            TRIED,
        )


def host_memory() -> float:
    """Bytes of main memory that this process may have: the machine's, or its container's if less."""
    found = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    # The limit of control groups, version 2 or 1; "max" and huge numbers stand for none.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found = min(found, float(Path(path).read_text()))
    return found
