# SPDX-License-Identifier: Apache-2.0
"""The sampler: its timesteps, and that a perfect network gets the perfect answer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax.diffusion.ddim import sample, timesteps
from digseg_jax.diffusion.schedule import make_schedule

T = 1000
SCHEDULE = make_schedule(T, 0.00085, 0.012, zero_snr=True, prediction_type="v_prediction")
PLAIN = make_schedule(T, 0.00085, 0.012, zero_snr=False, prediction_type="epsilon")
STEPS = (1, 2, 3, 4, 7, 50)


def clean(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 4, 4, 3))


def noise():
    return jax.random.normal(jax.random.key(99), (2, 4, 4, 3))


def oracle(x0, schedule):
    """A network that knows x0 and predicts exactly what it is trained to predict at x_t."""

    def denoise(x, t):
        signal, sigma = schedule.signal_and_noise(t)
        eps = (x - signal * x0) / jnp.maximum(sigma, 1e-8)
        return schedule.target(jnp.broadcast_to(x0, x.shape), eps, t)

    return denoise


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 666, 332]),
        (4, [999, 749, 499, 249]),
        (7, [999, 856, 713, 570, 428, 285, 142]),
    ],
)
def test_trailing_starts_at_the_last_timestep(steps, expected):
    np.testing.assert_array_equal(timesteps(T, steps, "trailing"), expected)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [1]),
        (2, [501, 1]),
        (3, [667, 334, 1]),
        (4, [751, 501, 251, 1]),
        (7, [853, 711, 569, 427, 285, 143, 1]),
    ],
)
def test_leading_ends_one_above_the_first_and_never_sees_pure_noise(steps, expected):
    np.testing.assert_array_equal(timesteps(T, steps, "leading"), expected)


def test_fifty_steps():
    np.testing.assert_array_equal(timesteps(T, 50, "trailing"), np.arange(999, 0, -20))
    np.testing.assert_array_equal(timesteps(T, 50, "leading"), np.arange(981, 0, -20))


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_every_number_of_steps_gives_that_many_falling_legal_timesteps(spacing):
    for steps in (*range(1, 130), 333, 999, 1000):
        points = timesteps(T, steps, spacing)
        assert len(points) == steps and points.dtype == np.int32
        assert (np.diff(points) < 0).all() and points[0] < T and points[-1] >= 0
        if spacing == "trailing":
            assert points[0] == T - 1


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_too_few_or_too_many_steps_are_refused(steps):
    with pytest.raises(ValueError, match="legal: 1 to 1000"):
        timesteps(T, steps, "trailing")


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="trailing, leading"):
        timesteps(T, 2, "linspace")


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", STEPS)
def test_the_network_is_asked_at_the_listed_timesteps_and_nowhere_else(steps, spacing):
    asked = []

    def denoise(x, t):
        jax.debug.callback(lambda t: asked.append(np.asarray(t).tolist()), t, ordered=True)
        return jnp.zeros_like(x)

    sample(denoise, noise(), SCHEDULE, steps=steps, spacing=spacing).block_until_ready()
    jax.effects_barrier()
    assert asked == [[t, t] for t in timesteps(T, steps, spacing).tolist()]


@pytest.mark.parametrize("steps", [3, 7])
def test_the_previous_timestep_comes_from_the_list_where_the_steps_do_not_divide(steps):
    """Against plain NumPy DDIM with a network that is wrong in a known way."""
    points = timesteps(T, steps, "trailing")
    table = np.asarray(SCHEDULE.alphas_cumprod)
    x = np.asarray(noise(), np.float64)
    for t, following in zip(points, [*points[1:], None], strict=True):
        a, b = np.sqrt(table[t]), np.sqrt(1 - table[t])
        v = np.sin(3 * x) + t / T
        x0, eps = a * x - b * v, a * v + b * x
        x = x0 if following is None else (
            np.sqrt(table[following]) * x0 + np.sqrt(1 - table[following]) * eps
        )  # fmt: skip
    got = sample(
        lambda x, t: jnp.sin(3 * x) + t[:, None, None, None] / T,
        noise(),
        SCHEDULE,
        steps=steps,
        spacing="trailing",
    )
    np.testing.assert_allclose(got, x, atol=2e-4)


def test_one_trailing_step_of_an_oracle_returns_x0_exactly():
    x0 = clean()
    got = sample(lambda x, t: -x0, noise(), SCHEDULE, steps=1, spacing="trailing")
    np.testing.assert_array_equal(got, x0)  # v at the last timestep is -x0


def test_one_leading_step_of_an_oracle_does_not_for_it_takes_noise_for_a_nearly_clean_latent():
    x0 = clean()

    def trained(x, t):
        """v of the pair (x0, noise) that a network trained on x_t would report."""
        return SCHEDULE.target(x0, noise(), t)

    got = sample(trained, noise(), SCHEDULE, steps=1, spacing="leading")
    assert float(jnp.abs(got - x0).mean()) > 0.5
    exact = sample(trained, noise(), SCHEDULE, steps=1, spacing="trailing")
    np.testing.assert_allclose(exact, x0, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("steps", STEPS)
def test_an_oracle_recovers_x0_whatever_the_number_of_steps(steps, prediction_type):
    base = PLAIN if prediction_type == "epsilon" else SCHEDULE
    schedule = dataclasses.replace(base, prediction_type=prediction_type)
    x0 = clean()
    # what the plain schedule calls its last timestep still holds some signal
    start = schedule.add_noise(x0, noise(), jnp.full(2, T - 1))
    got = sample(oracle(x0, schedule), start, schedule, steps=steps, spacing="trailing")
    np.testing.assert_allclose(got, x0, atol=2e-4)


def test_sampling_is_deterministic_and_works_under_jit():
    run = jax.jit(lambda x: sample(oracle(clean(), SCHEDULE), x, SCHEDULE, steps=3, spacing="leading"))
    np.testing.assert_array_equal(run(noise()), run(noise()))
