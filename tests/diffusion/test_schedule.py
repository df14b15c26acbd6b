# SPDX-License-Identifier: Apache-2.0
"""The noise schedule against a NumPy reference, and the identities between what a U-Net predicts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from digseg_jax.diffusion.schedule import make_schedule

T, START, END = 1000, 0.00085, 0.012
TYPES = ("epsilon", "v_prediction", "sample")


def schedule(prediction_type="v_prediction", zero_snr=True, num=T):
    return make_schedule(num, START, END, zero_snr=zero_snr, prediction_type=prediction_type)


def draws(n, seed=0):
    rng = np.random.default_rng(seed)
    x0, eps = rng.standard_normal((2, n, 4, 4, 2)).astype(np.float32)
    return x0, eps


def reference(zero_snr: bool) -> np.ndarray:
    """diffusers' `scaled_linear` betas and, in its own order of operations, arXiv 2305.08891."""
    betas = np.linspace(np.sqrt(START), np.sqrt(END), T) ** 2
    roots = np.exp(0.5 * np.cumsum(np.log1p(-betas)))
    if zero_snr:
        first, last = roots[0], roots[-1]
        roots = (roots - last) * (first / (first - last))
    return roots**2


@pytest.mark.parametrize("zero_snr", [False, True])
def test_abar_follows_the_reference(zero_snr):
    table = np.asarray(schedule(zero_snr=zero_snr).alphas_cumprod)
    np.testing.assert_allclose(table, reference(zero_snr), rtol=1e-9, atol=1e-15)
    assert (np.diff(table) < 0).all()


def test_stable_diffusions_own_end_points():
    table = schedule("epsilon", zero_snr=False).alphas_cumprod
    assert table[0] == pytest.approx(1 - START) and table[-1] == pytest.approx(0.00466, abs=1e-5)


def test_zero_snr_leaves_no_signal_at_the_last_timestep_and_the_first_as_it_was():
    table = schedule(zero_snr=True).alphas_cumprod
    assert table[-1] == 0.0
    assert table[0] == pytest.approx(1 - START)
    x0, eps = draws(2)
    last = schedule().add_noise(x0, eps, np.array([T - 1, T - 1]))
    np.testing.assert_array_equal(last, eps)


def test_signal_and_noise_are_a_rotation():
    signal, noise = schedule().signal_and_noise(np.arange(T))
    np.testing.assert_allclose(signal**2 + noise**2, 1.0, atol=1e-6)
    assert signal.shape == (T, 1, 1, 1)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("t", [0, 1, 250, 500, 900, 998, 999])
def test_the_target_gives_clean_latent_and_noise_back(prediction_type, t):
    s = schedule(prediction_type, zero_snr=prediction_type != "epsilon")
    x0, eps = draws(3, seed=t)
    ts = np.full(3, t)
    x = s.add_noise(x0, eps, ts)
    got_x0, got_eps = s.x0_and_eps(s.target(x0, eps, ts), x, ts)
    # dividing by a small signal or a small noise magnifies float32's rounding
    signal, noise = (float(v[0, 0, 0, 0]) for v in s.signal_and_noise(ts))
    x0_tolerance = 1e-5 / signal if prediction_type == "epsilon" else 1e-5
    eps_tolerance = 1e-5 / noise if prediction_type == "sample" else 1e-5
    np.testing.assert_allclose(got_x0, x0, atol=x0_tolerance)
    np.testing.assert_allclose(got_eps, eps, atol=eps_tolerance)


@pytest.mark.parametrize("t", [10, 500, 990])
def test_the_three_predictions_imply_one_another(t):
    x0, eps = draws(2, seed=1)
    ts = np.array([t, t])
    implied = []
    for kind in TYPES:
        # one table for all three, so that they describe the same x_t
        s = dataclasses.replace(schedule(), prediction_type=kind)
        implied.append(s.x0_and_eps(s.target(x0, eps, ts), s.add_noise(x0, eps, ts), ts))
    for got_x0, got_eps in implied[1:]:
        np.testing.assert_allclose(got_x0, implied[0][0], atol=2e-4)
        np.testing.assert_allclose(got_eps, implied[0][1], atol=2e-4)


def test_v_is_sqrt_abar_eps_minus_sqrt_one_minus_abar_x0():
    x0, eps = draws(1)
    abar = reference(True)[321]
    v = schedule().target(x0, eps, np.array([321]))
    np.testing.assert_allclose(v, np.sqrt(abar) * eps - np.sqrt(1 - abar) * x0, atol=1e-6)


def test_at_the_last_timestep_v_is_minus_x0():
    x0, eps = draws(1)
    np.testing.assert_array_equal(schedule().target(x0, eps, np.array([T - 1])), -x0)


def test_every_example_may_have_its_own_timestep():
    x0, eps = draws(3)
    ts = np.array([0, 500, 999])
    together = schedule().add_noise(x0, eps, ts)
    for i, t in enumerate(ts):
        alone = schedule().add_noise(x0[i : i + 1], eps[i : i + 1], np.array([t]))
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="undefined"):
        schedule("epsilon", zero_snr=True)
    with pytest.raises(ValueError, match="epsilon, v_prediction or sample"):
        schedule("score")
