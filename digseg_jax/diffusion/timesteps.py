# SPDX-License-Identifier: Apache-2.0
"""Distributions from which training draws timesteps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Int
from digseg_jax.diffusion.schedule import Schedule


def uniform(key: Array, schedule: Schedule) -> Int[Array, ""]:
    """Draws one timestep, uniform over 0 .. T-1."""
    return jax.random.randint(key, (), 0, schedule.num_timesteps)


def sampled(key: Array, other: Int[Array, ""], points: np.ndarray, share: float) -> Int[Array, ""]:
    """Draws one timestep: with probability `share` one of `points`, each as often, else `other`.

    points: timesteps that a sampler visits, int32 [s], as `ddim.timesteps` lists them; every one gets
      share / s of the draws, and what `other` gives it besides.
    """
    which, place = jax.random.split(key)
    point = jnp.asarray(points)[jax.random.randint(place, (), 0, len(points))]
    return jnp.where(jax.random.uniform(which) < share, point, other)


def high_noise(key: Array, schedule: Schedule, *, a: float, terminal_fraction: float) -> Int[Array, ""]:
    """Draws one timestep: T-1 with probability `terminal_fraction`, else from a tail of high noise.

    The tail draws g = a sqrt(u / (1 - u)) with uniform u, reads it as flow time with pure noise at 0,
    and takes the timestep of equal signal-to-noise ratio, (g / (1 - g))**2 (GenMask, arXiv
    2603.23906, whose density 2 a^2 t / (t^2 + a^2)^2 this g has).
    """
    terminal_key, tail_key = jax.random.split(key)

    # Flow time, kept off its two ends, where the ratios below would be 0 or infinite.
    u = jax.random.uniform(tail_key, maxval=1.0 - 1e-6)
    g = jnp.minimum(a * jnp.sqrt(u / (1.0 - u)), 1.0 - 1e-4)

    # The root of the signal-to-noise ratio falls with t, and `searchsorted` needs a rising table:
    # it is searched from the last timestep on.
    table = np.asarray(schedule.alphas_cumprod)
    ratio = np.sqrt(table / np.maximum(1.0 - table, 1e-12))[::-1].astype(np.float32)
    tail = schedule.num_timesteps - 1 - jnp.searchsorted(jnp.asarray(ratio), g / (1.0 - g))
    tail = jnp.clip(tail, 0, schedule.num_timesteps - 1)

    # The last timestep is the one that single-step sampling depends on alone.
    terminal = jax.random.uniform(terminal_key) < terminal_fraction
    return jnp.where(terminal, schedule.num_timesteps - 1, tail)
