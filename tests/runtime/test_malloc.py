# SPDX-License-Identifier: Apache-2.0
"""Freed memory is kept: loading images makes no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from digseg_jax.runtime.malloc import keep_freed_memory

def faults(times=50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        arrays = [np.ones(n, np.uint8) for n in (900_000, 300_000, 1_200_000)]
        del arrays
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times

default = faults()
if not keep_freed_memory():
    sys.exit(77)
faults()
print(default, faults())
"""


def test_arrays_of_an_images_size_are_not_asked_of_the_system_again():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert not done.returncode, done.stderr
    default, kept = map(float, done.stdout.split())
    assert kept < 5 <= default
