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

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.diffusion.schedule import Schedule

Denoise = Callable[[Float[Array, "b h w c"], Int[Array, "b"]], Float[Array, "b h w c"]]


def timesteps(num_train: int, steps: int, spacing: str) -> np.ndarray:
    """Returns the `steps` timesteps in falling order, int32; trailing starts at T-1, leading does not.

    Trailing: round(T - i T / S) - 1, so S=1 [999], S=2 [999, 499]. Leading: one above the multiples of
    T // S, so S=1 [1], S=2 [501, 1], as in Stable Diffusion's scheduler files (steps_offset 1).
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

    def next_latents(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return step(denoise, x, schedule, *now)[0], None

    points, following, last = step_list(schedule.num_timesteps, steps, spacing)
    xs = (jnp.asarray(points), jnp.asarray(following), jnp.asarray(last))
    return jax.lax.scan(next_latents, noise, xs)[0]


def step_list(num_train: int, steps: int, spacing: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timestep of every step, the one that follows it, and whether it is the last; [steps] each.

    Raises:
      ValueError: see `timesteps`.
    """
    # The last step returns x0 itself, so the timestep that would follow it does not matter.
    points = timesteps(num_train, steps, spacing)
    return points, np.append(points[1:], 0).astype(np.int32), np.arange(steps) == steps - 1


def step(
    denoise: Denoise,
    x: Float[Array, "b h w c"],
    schedule: Schedule,
    t: Int[Array, ""],
    t_next: Int[Array, ""],
    is_last: Bool[Array, ""],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """One step from timestep t: the latents at t_next, and the clean latents that it predicts."""
    batch_t = jnp.full(x.shape[0], t)

    # With eta 0, the noise that the prediction implies is put back at the next, lower level.
    x0, eps = schedule.x0_and_eps(denoise(x, batch_t), x, batch_t)
    x_next = schedule.add_noise(x0, eps, jnp.full(x.shape[0], t_next))
    return jnp.where(is_last, x0, x_next), x0
