# SPDX-License-Identifier: Apache-2.0
"""How training draws timesteps: mostly where there is little but noise."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from digseg_jax.config.schema import DiffusionConfig
from digseg_jax.diffusion.ddim import timesteps
from digseg_jax.diffusion.schedule import make_schedule
from digseg_jax.diffusion.timesteps import high_noise, sampled, uniform
from digseg_jax.training.tasks.parts import draw_noise_and_timestep

N = 20_000


def schedule(num=1000):
    return make_schedule(num, 0.00085, 0.012, zero_snr=True, prediction_type="v_prediction")


def draw(function, seed=0) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(seed), N)))


def tail(a: float, num=1000) -> np.ndarray:
    return draw(partial(high_noise, schedule=schedule(num), a=a, terminal_fraction=0.0))


def test_uniform_is_uniform_over_all_timesteps():
    t = draw(partial(uniform, schedule=schedule()))
    assert t.min() == 0 and t.max() == 999
    assert np.histogram(t, 10, (0, 1000))[0] / N == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_the_terminal_share_is_as_stated(fraction):
    t = draw(partial(high_noise, schedule=schedule(), a=0.1, terminal_fraction=fraction))
    assert (t == 999).mean() == pytest.approx(fraction, abs=0.015)


def test_the_tail_leans_to_high_noise():
    t = tail(0.05)
    assert np.median(t) == pytest.approx(904, abs=3)
    assert (t >= 800).mean() >= 0.8


def test_a_wider_scale_reaches_lower():
    t = tail(0.1)
    assert np.median(t) == pytest.approx(827, abs=4)
    assert (tail(0.05) >= 800).mean() > (t >= 800).mean()


def test_the_tail_follows_the_stated_distribution():
    """t <= T' exactly where g / (1 - g) is at least the root of the signal-to-noise ratio at T'."""
    a, t = 0.1, tail(0.1)
    abar = np.asarray(schedule().alphas_cumprod)
    for point in (300, 600, 900, 980):
        ratio = np.sqrt(abar[point] / (1 - abar[point]))
        g = ratio / (1 + ratio)
        share_above = g**2 / (a**2 + g**2)  # P(g' < g) of a sqrt(u / (1 - u))
        assert (t > point).mean() == pytest.approx(share_above, abs=0.015), point


@pytest.mark.parametrize("a", [0.01, 0.05, 1.0, 50.0])
def test_every_draw_is_a_legal_timestep(a):
    t = tail(a)
    assert t.min() >= 0 and t.max() <= 999 and t.dtype == np.int32


def test_short_schedules_work():
    t = tail(0.1, num=10)
    assert t.min() >= 0 and t.max() <= 9 and len(np.unique(t)) > 3


def test_draws_are_a_function_of_the_key():
    function = partial(high_noise, schedule=schedule(), a=0.1, terminal_fraction=0.5)
    np.testing.assert_array_equal(draw(function), draw(function))
    assert (draw(function) != draw(function, seed=1)).any()


class TestTheSamplersShare:
    """Draws at the timesteps that a sampler visits, over those of another distribution."""

    POINTS = timesteps(1000, 2, "trailing")  # 999, 499

    def mixed(self, share, base=uniform) -> np.ndarray:
        def one(key):
            return sampled(jax.random.fold_in(key, 1), base(key, schedule()), self.POINTS, share)

        return draw(one)

    @pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
    def test_every_point_gets_its_part_of_the_share(self, share):
        t = self.mixed(share)
        for point in self.POINTS:
            assert (t == point).mean() == pytest.approx(share / 2 + (1 - share) / 1000, abs=0.015)

    def test_the_rest_keeps_its_distribution(self):
        t = self.mixed(0.4)
        rest = t[~np.isin(t, self.POINTS)]
        assert len(rest) / N == pytest.approx(0.6, abs=0.015)
        assert np.histogram(rest, 10, (0, 1000))[0] / len(rest) == pytest.approx(0.1, abs=0.015)

    def test_the_second_step_is_rare_without_it(self):
        """What the documentation says of the default distribution."""
        base = partial(high_noise, a=0.1, terminal_fraction=0.5)
        assert (draw(partial(base, schedule=schedule())) <= 499).mean() == pytest.approx(
            0.036, abs=0.005
        )
        t = self.mixed(0.4, base)
        assert (t == 499).mean() == pytest.approx(0.2, abs=0.015)
        assert (t == 999).mean() == pytest.approx(0.2 + 0.6 * 0.5, abs=0.02)

    def test_training_draws_as_configured_and_a_share_of_zero_changes_no_draw(self):
        keys = jax.random.split(jax.random.key(0), 4000)

        def drawn(**changes):
            config = DiffusionConfig(**changes)
            return draw_noise_and_timestep(keys, (2, 2, 1), config, schedule())

        noise, t = drawn()
        for steps, points in ((2, (999, 499)), (4, (999, 749, 499, 249))):
            other, mixed = drawn(sampler_share=0.5, sampler_steps=steps)
            np.testing.assert_array_equal(other, noise)
            assert ((mixed == t) | np.isin(mixed, points)).all()
            lowest = (mixed == points[-1]).mean()
            assert lowest == pytest.approx(0.5 / steps, abs=0.03)
