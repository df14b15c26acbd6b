# SPDX-License-Identifier: Apache-2.0
"""Training noise: unit deviation always, coarse structure only where it is asked for."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from digseg_jax.diffusion.noise import gaussian, multires

SHAPE = (16, 16, 4)


def many(function, n=200):
    return np.asarray(jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(0), n)))


def coarse_share(noise: np.ndarray) -> float:
    """Variance of the means of 4x4 blocks; 1/16 for independent pixels of unit variance."""
    n, h, w, c = noise.shape
    return float(noise.reshape(n, h // 4, 4, w // 4, 4, c).mean(axis=(2, 4)).var())


def test_gaussian_is_standard_normal_and_independent_between_pixels():
    noise = many(lambda k: gaussian(k, SHAPE))
    assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)
    assert coarse_share(noise) == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
def test_multires_has_unit_deviation_in_every_example(strength):
    noise = many(lambda k: multires(k, SHAPE, strength))
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 1.0, atol=1e-4)
    assert noise.mean() == pytest.approx(0, abs=0.1)


def test_multires_without_strength_is_white_and_with_it_coarse():
    shares = [coarse_share(many(lambda k, s=s: multires(k, SHAPE, s))) for s in (0.0, 0.3, 0.9)]
    assert shares[0] == pytest.approx(1 / 16, rel=0.1)
    assert shares[0] < shares[1] < shares[2] and shares[2] > 4 / 16


def test_a_key_gives_one_noise_and_another_key_another():
    key, other = jax.random.split(jax.random.key(1))
    for function in (gaussian, lambda k, s: multires(k, s, 0.5)):
        np.testing.assert_array_equal(function(key, SHAPE), function(key, SHAPE))
        assert (np.asarray(function(key, SHAPE)) != np.asarray(function(other, SHAPE))).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 1), (16, 2, 4)])
def test_odd_shapes_work(shape):
    noise = np.asarray(multires(jax.random.key(0), shape, 0.9))
    assert noise.shape == shape and np.isfinite(noise).all()
