# SPDX-License-Identifier: Apache-2.0
"""JSON values between processes: any size arrives whole, by programs of few shapes."""

from __future__ import annotations

import concurrent.futures
import threading

import numpy as np
import pytest

from digseg_jax.runtime import collectives

COUNT = 3  # processes
# What each of them has: alike, shorter or longer than the first, across the powers of two.
LENGTHS = [(1, 1, 1), (2, 7, 120), (121, 2, 1), (500, 900, 7), (7, 120, 900)]
VALUES = [[{"row": letter * n} for letter, n in zip("abc", row, strict=True)] for row in LENGTHS]


class Processes:
    """Threads in place of processes, with stand-ins for the exchanges of JAX's."""

    def __init__(self):
        self.sizes: set[int] = set()  # of the arrays that were exchanged
        self._own, self._barrier = threading.local(), threading.Barrier(COUNT, timeout=60)
        self._given = [np.zeros(0)] * COUNT

    def is_main(self):
        return self._own.number == 0

    def all_gather(self, array):
        self.sizes.add(np.size(array))
        self._given[self._own.number] = array
        self._barrier.wait()
        every = np.stack(self._given)  # an error unless all have one shape
        self._barrier.wait()
        return every

    def broadcast(self, array):
        return self.all_gather(array)[0]

    def call(self, function, values):
        """What each process gets that calls the function with its value."""

        def one(number, value):
            self._own.number = number
            return function(value)

        with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(one, range(COUNT), values))


@pytest.fixture
def processes(monkeypatch):
    made = Processes()
    monkeypatch.setattr(collectives.jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(collectives, "is_main", made.is_main)
    utils = collectives.multihost_utils
    monkeypatch.setattr(utils, "process_allgather", made.all_gather)
    monkeypatch.setattr(utils, "broadcast_one_to_all", made.broadcast)
    return made


def test_every_process_gets_all_values_in_their_order(processes):
    for values in VALUES:
        assert processes.call(collectives.gather_all, values) == [values] * COUNT
    assert processes.sizes == {1, 16, 256, 1024}  # 1: the size that goes ahead


def test_every_process_gets_the_value_of_the_first(processes):
    for values in VALUES:
        assert processes.call(collectives.tell_all, values) == [values[0]] * COUNT
    assert processes.sizes == {1, 16, 32, 256, 512}
