# SPDX-License-Identifier: Apache-2.0
"""Data workers: how the processes that read examples start and end, and the memory they need."""

from __future__ import annotations

import os
import signal
import threading
import time

import cv2

from digseg_jax.log import log
from digseg_jax.runtime.malloc import keep_freed_memory

SHARED_MEMORY = "/dev/shm"  # through which workers pass their batches
ENOUGH = 256 * 2**20  # bytes; Docker's default is 64 MiB
WATCH_EVERY = 5.0  # seconds


def start_worker(index: int, count: int) -> None:
    """Prepares a worker process: one thread for OpenCV, freed memory kept, deaf to Ctrl-C.

    The worker ends when the process that started it has ended.
    """
    # Terminals and schedulers signal workers too, but the loop still needs their batch for its step.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with, args=(os.getppid(),), name="watch", daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended: after a kill -9 nothing else would."""
    while os.getppid() == parent:
        time.sleep(WATCH_EVERY)
    os._exit(0)


def tell_shared_memory(workers: int, place: str = SHARED_MEMORY) -> None:
    """Warns where shared memory is so small that workers may die of SIGBUS, which names no cause."""
    try:
        found = os.statvfs(place)
    except OSError:  # no such place, as outside Linux: nothing is known
        return

    size = found.f_frsize * found.f_blocks
    if workers and size < ENOUGH:
        log.warning(
            "%s has %d MiB: data workers that die of signal 7 (SIGBUS) have filled it; give the "
            "container more (docker run --shm-size=2g) or set config.loading.workers=0",
            place, size // 2**20,
        )  # fmt: skip
