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

ENSEMBLE_RULES = ("mean", "median", "vote")
DECODERS = ("latent_mean", "vae", "probe")

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
    seed: int | Array, index: Int[Array, "n"], ensemble: int, shape: tuple[int, int, int]
) -> Float[Array, "n e h w c"]:
    """Initial noise, a pure function of (seed, image index, member): the same for all queries.

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
    """Denoised mask latents of every query, member by member.

    tokens, mask: one list of queries for all images, or with a leading axis one list for each.
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


def member_probabilities(
    evidence: Float[Array, "n q e h w"],
    scale: float | Array,
    bias: Float[Array, "*n q"],
    codec: str = "binary",
) -> Float[Array, "n q e h w"]:
    """What each member alone says: sigmoid per query (binary), softmax over classes (palette).

    bias: one for each query, the same for all images or with a leading axis for each.
    """
    logits = scale * evidence + bias[..., None, None, None]
    return jax.nn.softmax(logits, axis=1) if codec == "palette" else jax.nn.sigmoid(logits)


def combine(
    members: Float[Array, "n q e h w"], rule: str = "mean", *, exclusive: bool = False
) -> Float[Array, "n q h w"]:
    """One answer of the whole ensemble.

    mean: of the probabilities (never of colours). median: theirs. vote: the share of members that
    chose the query, which is the most probable one of its pixel if `exclusive` (closed sets), else
    any with more than 0.5.
    """
    if rule == "mean":
        return members.mean(axis=2)
    if rule == "median":
        return jnp.median(members, axis=2)
    if rule != "vote":
        raise ValueError(f"ensemble rule {rule!r}; legal: {', '.join(ENSEMBLE_RULES)}")
    if not exclusive:
        return (members > 0.5).astype(members.dtype).mean(axis=2)
    chosen = jnp.argmax(members, axis=1)[:, None]
    queries = jnp.arange(members.shape[1])[None, :, None, None, None]
    return (chosen == queries).astype(members.dtype).mean(axis=2)


def probabilities(
    evidence: Float[Array, "n q e h w"],
    scale: float | Array,
    bias: Float[Array, "*n q"],
    *,
    codec: str = "binary",
    rule: str = "mean",
) -> Float[Array, "n q h w"]:
    """`member_probabilities`, combined over the members; a palette's classes exclude each other."""
    members = member_probabilities(evidence, scale, bias, codec)
    return combine(members, rule, exclusive=codec == "palette")
