# SPDX-License-Identifier: Apache-2.0
"""Deterministic DDIM sampling (arXiv 2010.02502, eta 0) as one `lax.scan`.

Differs from diffusers' `scheduling_ddim.py` where that is wrong: the previous timestep comes from the
list rather than from `t - T // S`, and the last step returns the predicted x0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Float, Int
from digseg_jax.diffusion.schedule import Schedule

Denoise = Callable[[Float[Array, "b h w c"], Int[Array, "b"]], Float[Array, "b h w c"]]


def timesteps(num_train: int, steps: int, spacing: str) -> np.ndarray:
    """Returns the `steps` timesteps in falling order, int32; trailing starts at T-1, leading does not.

    Trailing: round(T - i T / S) - 1, so S=1 [999], S=2 [999, 499]. Leading: one above the multiples of
    T // S, so S=1 [1], S=2 [501, 1], as Stable Diffusion's scheduler files have it (steps_offset 1).
    For S=T they are all T timesteps; diffusers would begin at T, which does not exist.

    Raises:
      ValueError: unknown spacing, or more steps than training timesteps.
    """
    if not 1 <= steps <= num_train:
        raise ValueError(f"{steps} sampling steps; legal: 1 to {num_train}")
    if spacing == "trailing":
        points = np.round(np.arange(num_train, 0, -num_train / steps))[:steps] - 1
    elif spacing == "leading":
        points = np.arange(steps)[::-1] * (num_train // steps) + (steps < num_train)
    else:
        raise ValueError(f"timestep spacing {spacing!r}; legal: trailing, leading")
    return points.astype(np.int32)


def sample(
    denoise: Denoise,
    noise: Float[Array, "b h w c"],
    schedule: Schedule,
    *,
    steps: int,
    spacing: str,
) -> Float[Array, "b h w c"]:
    """Denoises to clean latents in `steps` steps; `denoise(x_t, t)` is the network's raw prediction.

    Raises:
      ValueError: unknown spacing, or more steps than training timesteps.
    """
    points = timesteps(schedule.num_timesteps, steps, spacing)

    # The last step returns x0 itself, so the timestep that would follow it does not matter.
    following = np.append(points[1:], 0).astype(np.int32)
    last = np.arange(steps) == steps - 1

    def step(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, t_next, is_last = now
        batch_t = jnp.full(x.shape[0], t)

        # With eta 0, the noise that the prediction implies is put back at the next, lower level.
        x0, eps = schedule.x0_and_eps(denoise(x, batch_t), x, batch_t)
        x_next = schedule.add_noise(x0, eps, jnp.full(x.shape[0], t_next))
        return jnp.where(is_last, x0, x_next), None

    xs = (jnp.asarray(points), jnp.asarray(following), jnp.asarray(last))
    return jax.lax.scan(step, noise, xs)[0]
