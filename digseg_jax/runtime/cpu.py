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


def host_memory(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of main memory that the processes of a job share here: the machine's, or its job's if less.

    A container and a job of SLURM or systemd have limits of their own, as control groups.

    proc: names the process's control groups. mount: the folder of all groups.
    """
    found = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    # Lines such as 0::/slurm/job_7/step_0 (version 2) and 9:memory:/slurm/job_7 (version 1). A
    # container may not see its own group below the mount, but then the mount is its group.
    groups = {(mount, "memory.max", "/"), (mount / "memory", "memory.limit_in_bytes", "/")}
    with contextlib.suppress(OSError, ValueError):
        for line in proc.read_text().splitlines():
            number, kinds, group = line.split(":", 2)
            if number == "0":
                groups.add((mount, "memory.max", group))
            elif "memory" in kinds.split(","):
                groups.add((mount / "memory", "memory.limit_in_bytes", group))

    # A group has no more than those above it; "max" and huge numbers stand for no limit.
    for top, name, group in groups:
        own = top / group.lstrip("/")
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):
                found = min(found, float((folder / name).read_text()))
    return found
