# SPDX-License-Identifier: Apache-2.0
"""Whether two streams gave the same batches, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np


def assert_same(a: Sequence[Mapping], b: Sequence[Mapping]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def assert_same_bits(a, b):
    leaves, others = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    for (path, x), (other, y) in zip(leaves, others, strict=True):
        assert path == other
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))
