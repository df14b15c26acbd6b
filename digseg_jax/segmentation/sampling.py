# SPDX-License-Identifier: Apache-2.0
"""E-Step inference: every member's mask latent of every (image, query), denoised in a few steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.config.sampling import EStep
from digseg_jax.diffusion.ddim import Denoise, sample, step
from digseg_jax.diffusion.schedule import Schedule

# (image latents [n h w c], x_t [n h w c], t [n], tokens [n l d], mask [n l]) -> prediction [n h w c]
PredictLatent = Callable[[Array, Array, Array, Array, Array], Array]


def member_noise(
    seed: int | Array, index: Int[Array, "n"], ensemble: int, shape: tuple[int, ...]
) -> Float[Array, "n e h w c"]:
    """Draws initial noise, a pure function of (seed, image index, member) and the same for all queries.

    seed: a number, or a key of `jax.random.key`.
    """
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    root = seed if is_key else jax.random.key(seed)

    def one(image: Array, member: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(root, image), member)
        return jax.random.normal(key, shape)

    members = jnp.arange(ensemble)
    return jax.vmap(lambda i: jax.vmap(lambda e: one(i, e))(members))(index)


def sample_mask_latents(
    predict_latent: PredictLatent,
    image_latent: Float[Array, "n h w c"],
    tokens: Float[Array, "*n q l d"] | Float[Array, "m q e l d"],
    mask: Bool[Array, "*n q l"] | Bool[Array, "m q e l"],
    noise: Float[Array, "n e h w c"],
    schedule: Schedule,
    estep: EStep,
) -> Float[Array, "n q e h w c"]:
    """Denoises the mask latents of all images, queries and members as one batch.

    Args:
      predict_latent: the network's prediction, as the schedule's prediction type defines it.
      image_latent: scaled latents of the images.
      tokens, mask: text of q queries, the same for all images, or with a leading axis a list each; with
        a text for each member the leading axis is there in any case, 1 if the images share it.
      noise: of every image and member, see `member_noise`.
      schedule: noise schedule.
      estep: number and spacing of the steps.
    """
    q = tokens.shape[1] if tokens.ndim == 5 else tokens.shape[-3]
    latents = sample(
        _denoiser(predict_latent, image_latent, tokens, mask, noise.shape[1]),
        _spread(noise, (1,), (noise.shape[0], q, noise.shape[1])),
        schedule,
        steps=estep.steps,
        spacing=estep.spacing,
    )
    return latents.reshape(noise.shape[0], q, *noise.shape[1:])


def step_mask_latents(
    predict_latent: PredictLatent,
    image_latent: Float[Array, "n h w c"],
    tokens: Float[Array, "*n q l d"],
    mask: Bool[Array, "*n q l"],
    x: Float[Array, "n q h w c"],
    schedule: Schedule,
    now: tuple[Array, Array, Array],
) -> tuple[Float[Array, "n q h w c"], Float[Array, "n q h w c"]]:
    """One step of `sample_mask_latents` for one member: the next latents, and the clean ones so far.

    now: the step's timestep, the one that follows, and whether it is the last (see `ddim.step_list`).
    """
    denoise = _denoiser(predict_latent, image_latent, tokens, mask, 1)
    found, clean = step(denoise, x.reshape(-1, *x.shape[2:]), schedule, *now)
    return found.reshape(x.shape), clean.reshape(x.shape)


def _denoiser(
    predict_latent: PredictLatent,
    image_latent: Float[Array, "n h w c"],
    tokens: Float[Array, "*n q l d"] | Float[Array, "m q e l d"],
    mask: Bool[Array, "*n q l"] | Bool[Array, "m q e l"],
    ensemble: int,
) -> Denoise:
    """The network's prediction for all images, queries and members as one batch."""
    lacking = {3: (0, 2), 4: (2,), 5: ()}[tokens.ndim]
    queries = tokens.shape[1] if tokens.ndim == 5 else tokens.shape[-3]
    axes = (image_latent.shape[0], queries, ensemble)
    image = _spread(image_latent, (1, 2), axes)
    text, text_mask = _spread(tokens, lacking, axes), _spread(mask, lacking, axes)
    return lambda x, t: predict_latent(image, x, t, text, text_mask)


def _spread(x: Array, where: tuple[int, ...], axes: tuple[int, int, int]) -> Array:
    """Repeats x along the axes (images, queries, members) that it lacks, and merges them into one."""
    x = jnp.expand_dims(x, where)
    return jnp.broadcast_to(x, (*axes, *x.shape[3:])).reshape(-1, *x.shape[3:])
