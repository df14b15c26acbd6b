# SPDX-License-Identifier: Apache-2.0
"""Group normalization: values and written-out gradients against the plain formula's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax.models.kernels.group_norm import group_norm

GROUPS, EPS = 4, 1e-5


def plain(x, scale, bias, silu):
    b, c = x.shape[0], x.shape[-1]
    grouped = x.astype(jnp.float32).reshape(b, -1, GROUPS, c // GROUPS)
    centered = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    variance = jnp.square(centered).mean(axis=(1, 3), keepdims=True)
    y = (centered / jnp.sqrt(variance + EPS)).reshape(x.shape) * scale + bias
    return jax.nn.silu(y) if silu else y


def ours(x, scale, bias, silu):
    return group_norm(x, scale, bias, GROUPS, EPS, silu, jnp.float32)


def arguments(shape=(2, 5, 7, 12), dtype=jnp.float32, mean=3.0):
    keys = jax.random.split(jax.random.key(0), 3)
    x = mean + 2.0 * jax.random.normal(keys[0], shape)
    return (
        x.astype(dtype),
        1.0 + 0.3 * jax.random.normal(keys[1], shape[-1:]),
        jax.random.normal(keys[2], shape[-1:]),
    )


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7, 12), (3, 11, 8), (1, 1, 1, 8)])
def test_values_are_the_formulas(shape, silu):
    x = arguments(shape)
    np.testing.assert_allclose(ours(*x, silu), plain(*x, silu), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, outlier", [(1e3, 0.0), (-30.0, 1e3), (0.0, -1e4)])
def test_float32_statistics_do_not_cancel(mean, outlier):
    """Far means, channels apart, and a pixel far from all others, against float64."""
    x, scale, bias = (np.array(a) for a in arguments((2, 16, 9, 8), mean=mean))
    x += np.arange(8)
    x[:, 0, 0] += outlier
    grouped = x.astype(np.float64).reshape(2, -1, GROUPS, 2)
    centered = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    deviation = np.sqrt(np.square(centered).mean(axis=(1, 3), keepdims=True) + EPS)
    expected = (centered / deviation).reshape(x.shape) * scale + bias
    # half a digit of x itself, in units of the deviation
    tolerance = 2e-5 + np.abs(x).max() * 1e-7 / deviation.min()
    np.testing.assert_allclose(ours(x, scale, bias, False), expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("silu", [False, True])
def test_gradients_are_those_of_automatic_differentiation(silu):
    x = arguments()
    weight = jax.random.normal(jax.random.key(9), x[0].shape)

    def gradients(function):
        return jax.grad(lambda *a: (weight * function(*a, silu)).sum(), argnums=(0, 1, 2))(*x)

    for own, expected in zip(gradients(ours), gradients(plain), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_sixteen_bit_inputs_lose_nothing_beyond_their_own_rounding(mean):
    x, scale, bias = arguments(dtype=jnp.bfloat16, mean=mean)
    exact = plain(x.astype(jnp.float32), scale, bias, True)
    assert group_norm(x, scale, bias, GROUPS, EPS, True, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_allclose(ours(x, scale, bias, True), exact, atol=3e-4)
    gradient = jax.grad(lambda x: ours(x, scale, bias, True).sum())(x)
    assert gradient.dtype == jnp.bfloat16


def test_only_the_input_is_kept_for_the_backward_pass():
    x = arguments(shape=(2, 16, 16, 32), dtype=jnp.bfloat16)

    def pullback(*arguments):
        return jax.vjp(lambda *a: ours(*a, True), *arguments)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, *x))
    assert sum(k.shape == (2, 16, 16, 32) for k in kept) == 1
