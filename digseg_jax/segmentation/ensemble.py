# SPDX-License-Identifier: Apache-2.0
"""One probability of several members: combine, or decode their mean."""

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
) -> Float[Array, "n q e h w"]:
    """What each member alone says: sigmoid per query; softmax over those that exclude one another.

    bias: one for each query, the same for all images or with a leading axis for each.
    """
    logits = scale * evidence + bias[..., None, None, None]
    return jax.nn.softmax(logits, axis=1) if exclusive else jax.nn.sigmoid(logits)


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
    exclusive: bool = False,
    rule: str = "mean",
) -> Float[Array, "n q h w"]:
    """`member_probabilities`, combined over the members."""
    members = member_probabilities(evidence, scale, bias, exclusive=exclusive)
    return combine(members, rule, exclusive=exclusive)
