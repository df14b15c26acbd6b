# SPDX-License-Identifier: Apache-2.0
"""JSON values between processes: any size arrives whole, by programs of few shapes."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.runtime import collectives

VALUES = [{"row": "x" * count} for count in (1, 2, 7, 120, 121, 500, 900)]


@pytest.fixture
def sent(monkeypatch):
    """Lengths of the arrays that two processes exchange; both send the same."""
    lengths = []

    def exchange(array):
        lengths.append(np.size(array))
        return array

    monkeypatch.setattr(collectives.jax, "process_count", lambda: 2)
    utils = collectives.multihost_utils
    monkeypatch.setattr(utils, "process_allgather", lambda x: np.stack([exchange(x)] * 2))
    monkeypatch.setattr(utils, "broadcast_one_to_all", exchange)
    return lengths


def test_every_process_gets_all_values(sent):
    for value in VALUES:
        assert collectives.gather_all(value) == [value, value]
    assert set(sent) == {1, 16, 32, 256, 512, 1024}  # 1: the size that goes ahead


def test_every_process_gets_the_value_of_the_first(sent):
    for value in VALUES:
        assert collectives.tell_all(value) == value
    assert set(sent) == {1, 16, 32, 256, 512, 1024}
