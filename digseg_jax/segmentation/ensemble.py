# SPDX-License-Identifier: Apache-2.0
"""Turns the evidence of an ensemble's members into one probability for each query and pixel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Float

ENSEMBLE_RULES = ("mean", "median", "vote")


def member_probabilities(
    evidence: Float[Array, "n q e h w"],
    scale: float | Array,
    bias: Float[Array, "*n q"],
    *,
    exclusive: bool = False,
    background: bool = False,
) -> Float[Array, "n q e h w"]:
    """Probabilities of each member on its own.

    Args:
      evidence: of n images, q queries and e members.
      scale: factor from evidence to logits.
      bias: added to each query's logits; the same for all images, or with a leading axis one for each.
      exclusive: a pixel belongs to exactly one query: softmax over the queries instead of sigmoids.
      background: or to none of them, which takes part in the softmax with the logit 0.
    """
    logits = scale * evidence + bias[..., None, None, None]
    if not exclusive:
        return jax.nn.sigmoid(logits)
    if background:
        logits = jnp.pad(logits, ((0, 0), (0, 1), *[(0, 0)] * 3))
    return jax.nn.softmax(logits, axis=1)[:, : evidence.shape[1]]


def combine(
    members: Float[Array, "n q e h w"],
    rule: str = "mean",
    *,
    exclusive: bool = False,
    background: bool = False,
) -> Float[Array, "n q h w"]:
    """Combines the members' probabilities by a rule of `ENSEMBLE_RULES`.

    vote: the share of members that chose the query. A member chooses the pixel's most probable query
    if they are `exclusive`, unless the `background` is more probable; otherwise each query above 0.5.
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
    votes = chosen == queries
    if background:
        votes &= members >= 1.0 - members.sum(axis=1, keepdims=True)
    return votes.astype(members.dtype).mean(axis=2)


def probabilities(
    evidence: Float[Array, "n q e h w"],
    scale: float | Array,
    bias: Float[Array, "*n q"],
    *,
    exclusive: bool = False,
    background: bool = False,
    rule: str = "mean",
) -> Float[Array, "n q h w"]:
    """`member_probabilities`, combined over the members."""
    kind = {"exclusive": exclusive, "background": background}
    return combine(member_probabilities(evidence, scale, bias, **kind), rule, **kind)
