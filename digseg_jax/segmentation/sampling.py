# SPDX-License-Identifier: Apache-2.0
"""E-Step inference: every member's mask latent of every (image, query), denoised in a few steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.config.sampling import EStep
from digseg_jax.diffusion.ddim import sample
from digseg_jax.diffusion.schedule import Schedule

DECODERS = ("latent_mean", "vae", "probe")

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
    tokens: Float[Array, "*n q l d"],
    mask: Bool[Array, "*n q l"],
    noise: Float[Array, "n e h w c"],
    schedule: Schedule,
    estep: EStep,
) -> Float[Array, "n q e h w c"]:
    """Denoises the mask latents of all images, queries and members as one batch.

    Args:
      predict_latent: the network's prediction, as the schedule's prediction type defines it.
      image_latent: scaled latents of the images.
      tokens, mask: text of q queries, the same for all images, or with a leading axis a list each.
      noise: of every image and member, see `member_noise`.
      schedule: noise schedule.
      estep: number and spacing of the steps.
    """
    n, e, h, w, c = noise.shape
    q = tokens.shape[-3]
    axes = (n, q, e)
    lacking = (2,) if tokens.ndim == 4 else (0, 2)

    def spread(x: Array, where: tuple[int, ...]) -> Array:
        """Repeats x along the axes (n, q, e) that it lacks and merges them into one batch axis."""
        x = jnp.expand_dims(x, where)
        return jnp.broadcast_to(x, (*axes, *x.shape[3:])).reshape(n * q * e, *x.shape[3:])

    image = spread(image_latent, (1, 2))
    text, text_mask = spread(tokens, lacking), spread(mask, lacking)
    latents = sample(
        lambda x, t: predict_latent(image, x, t, text, text_mask),
        spread(noise, (1,)),
        schedule,
        steps=estep.steps,
        spacing=estep.spacing,
    )
    return latents.reshape(*axes, h, w, c)
