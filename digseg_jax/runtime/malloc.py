# SPDX-License-Identifier: Apache-2.0
"""Keeps the memory of freed arrays for the next ones, through glibc's malloc.

By default glibc gives the memory of a large array back as soon as it is freed: the system then clears
the same pages again and again. A decoded 640x480 image with its label causes 716 page faults, which
cost as much time as the decoding (3.4 ms against 1.6 ms); a restored checkpoint is copied twice on its
way, each time through fresh pages (3.4 s for 3.4 GB in memory, against 2.0 s).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Numbers of mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MiB = 2**20


def keep_freed_memory(*, arrays: int = 32 * MiB, total: int = 256 * MiB) -> bool:
    """Asks malloc to keep up to `total` bytes of freed arrays of at most `arrays` bytes each.

    The defaults are meant for a stream of images, and for the life of the process.

    Returns:
      True if malloc agrees (glibc), False on other systems, which are left as they are.
    """
    libc = _glibc()
    if libc is None:
        return False

    # Both are needed: arrays above the first bypass the heap, and above the second the heap shrinks.
    limits = ((_M_MMAP_THRESHOLD, arrays), (_M_TRIM_THRESHOLD, total))
    return all(libc.mallopt(*limit) for limit in limits)


@contextlib.contextmanager
def kept_while_loading() -> Iterator[None]:
    """Keeps more during a large load; afterwards gives idle memory back to the system."""
    # glibc's parameters are C ints, so 2047 MiB is the most.
    keep_freed_memory(arrays=1024 * MiB, total=2047 * MiB)
    try:
        yield
    finally:
        keep_freed_memory()
        if libc := _glibc():
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # not in musl
