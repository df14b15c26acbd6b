# SPDX-License-Identifier: Apache-2.0
"""The kernel for attention to a text's few keys, interpreted, against plain attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from digseg_jax.models.kernels import attention as kernels
from digseg_jax.models.kernels.attention import plain
from digseg_jax.models.kernels.cross_attention import few_keys, takes
from digseg_jax.models.partition import LocalAttention
from digseg_jax.runtime.sharding import BATCH, on_mesh

LIMIT = 1e-5
INTERPRETED = partial(few_keys, interpret=True)


def arrays(b=2, length=256, keys=77, heads=3, d=24):
    keys_of = jax.random.split(jax.random.key(0), 3)
    shapes = [(b, length, heads, d), (b, keys, heads, d), (b, keys, heads, d)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys_of, shapes, strict=True)]


def with_gradients(function, q, k, v, mask=None):
    """Output and gradients for a cotangent that tells all of it apart."""
    weigh = jnp.cos(jnp.arange(q.size).reshape(q.shape)).astype(q.dtype)
    value, pullback = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
    return value, *pullback(weigh)


def relative_l2(actual, expected) -> float:
    actual, expected = (a.astype(jnp.float32) for a in (actual, expected))
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize(
    ("length", "keys", "heads", "d"), [(256, 77, 3, 24), (128, 128, 1, 64), (384, 5, 8, 40)]
)
def test_it_equals_plain_forward_and_backward(length, keys, heads, d):
    given = arrays(2, length, keys, heads, d)
    pairs = zip(with_gradients(INTERPRETED, *given), with_gradients(plain, *given), strict=True)
    for a, b in pairs:
        assert relative_l2(a, b) <= LIMIT


def test_padding_is_left_out_and_an_empty_text_weighs_evenly():
    q, k, v = arrays(3)
    mask = jnp.arange(77)[None] < jnp.array([[77], [4], [0]])
    found = with_gradients(INTERPRETED, q, k, v, mask)
    for a, b in zip(found, with_gradients(plain, q, k, v, mask), strict=True):
        assert relative_l2(a, b) <= LIMIT
    np.testing.assert_allclose(found[0][2], jnp.broadcast_to(v[2].mean(axis=0), q[2].shape), atol=1e-5)
    assert not np.asarray(found[2][1, 4:]).any() and not np.asarray(found[3][1, 4:]).any()


def test_sixteen_bits_are_no_further_from_the_exact_result_than_plain():
    given = arrays()
    half = [a.astype(jnp.bfloat16) for a in given]
    exact, rounded = with_gradients(plain, *given), with_gradients(plain, *half)
    for a, b, truth in zip(with_gradients(INTERPRETED, *half), rounded, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_l2(a, truth) <= 1.1 * relative_l2(b, truth) + 1e-3


def test_each_device_has_its_own_examples_and_heads():
    q, k, v = arrays(4, 128, heads=2)
    mask = jnp.arange(77)[None] < jnp.array([[5], [77], [1], [4]])
    local = LocalAttention(partial(kernels.splash, interpret=True))
    mesh = tiny.mesh(2, 2, 2)
    step = jax.jit(on_mesh(mesh, local), in_shardings=NamedSharding(mesh, BATCH))
    assert relative_l2(step(q, k, v, mask), plain(q, k, v, mask)) <= LIMIT


@pytest.mark.parametrize(
    ("length", "keys", "taken"),
    [(4096, 77, True), (128, 128, True), (64, 77, False), (256, 150, False)],
)
def test_what_it_takes(length, keys, taken):
    assert takes(length, keys) == taken
