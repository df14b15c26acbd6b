# SPDX-License-Identifier: Apache-2.0
"""E-Step inference: E members x S denoising steps for every (image, query), one compiled program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.diffusion.ddim import sample
from digseg_jax.diffusion.schedule import Schedule
from digseg_jax.errors import UserError

# (image latents [n h w c], x_t [n h w c], t [n], tokens [n l d], mask [n l]) -> prediction [n h w c]
PredictLatent = Callable[[Array, Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class EStep:
    """E members, S sampling steps, timestep spacing; written "8x2" or "20x50:leading"."""

    ensemble: int
    steps: int
    spacing: str = "trailing"

    @classmethod
    def parse(cls, text: str) -> EStep:
        """Raises UserError unless the text looks like 8x2 or 8x2:leading."""
        match = re.fullmatch(r"(\d+)x(\d+)(?::(trailing|leading))?", text)
        if not match or min(int(match[1]), int(match[2])) < 1:
            raise UserError(f"E-Step {text!r}: expected ExS or ExS:leading, such as 8x2")
        return cls(int(match[1]), int(match[2]), match[3] or "trailing")

    def __str__(self) -> str:
        suffix = "" if self.spacing == "trailing" else f":{self.spacing}"
        return f"{self.ensemble}x{self.steps}{suffix}"


def member_noise(
    seed: int, index: Int[Array, "n"], ensemble: int, shape: tuple[int, int, int]
) -> Float[Array, "n e h w c"]:
    """Initial noise, a pure function of (seed, image index, member): the same for all queries."""

    def one(image: Array, member: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), image), member)
        return jax.random.normal(key, shape)

    members = jnp.arange(ensemble)
    return jax.vmap(lambda i: jax.vmap(lambda e: one(i, e))(members))(index)


def sample_mask_latents(
    predict_latent: PredictLatent,
    image_latent: Float[Array, "n h w c"],
    tokens: Float[Array, "q l d"],
    mask: Bool[Array, "q l"],
    noise: Float[Array, "n e h w c"],
    schedule: Schedule,
    estep: EStep,
) -> Float[Array, "n q e h w c"]:
    """Denoised mask latents of every query, member by member."""
    n, e, h, w, c = noise.shape
    q = tokens.shape[0]
    axes = (n, q, e)

    def spread(x: Array, where: tuple[int, ...]) -> Array:
        """Repeats x along the axes (n, q, e) that it lacks and merges them into one batch axis."""
        x = jnp.expand_dims(x, where)
        return jnp.broadcast_to(x, (*axes, *x.shape[3:])).reshape(n * q * e, *x.shape[3:])

    image = spread(image_latent, (1, 2))
    text, text_mask = spread(tokens, (0, 2)), spread(mask, (0, 2))
    latents = sample(
        lambda x, t: predict_latent(image, x, t, text, text_mask),
        spread(noise, (1,)),
        schedule,
        steps=estep.steps,
        spacing=estep.spacing,
    )
    return latents.reshape(*axes, h, w, c)


def probabilities(
    evidence: Float[Array, "n q e h w"], scale: float | Array, bias: Float[Array, "q"]
) -> Float[Array, "n q h w"]:
    """sigmoid(scale * evidence + bias) averaged over members: probabilities, never colours."""
    logits = scale * evidence + bias[None, :, None, None, None]
    return jax.nn.sigmoid(logits).mean(axis=2)
