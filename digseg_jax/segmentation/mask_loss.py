# SPDX-License-Identifier: Apache-2.0
"""An auxiliary loss on the mask that a predicted latent stands for, without decoding it.

Latents of binary masks lie close to one line, from the latent of an empty mask to that of a full one;
the position on it tells the foreground share of a cell. A deviation from the paper's plain MSE that
keeps masks of rare classes from staying empty in short trainings (it is off by default).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float

SHARPNESS = 4.0  # logits per unit of evidence, which runs from -1 (empty) to 1 (full)
MAX_WEIGHT = 10.0  # of foreground cells against background cells


def latent_evidence(
    latent: Float[Array, "n h w c"],
    encode: Callable[[Float[Array, "2 H W 3"]], Float[Array, "2 h w c"]],
    size: int,
) -> Float[Array, "n h w"]:
    """Position between the latents of an empty (-1) and a full (1) mask of `size` pixels a side."""
    ends = jnp.broadcast_to(jnp.asarray([-1.0, 1.0])[:, None, None, None], (2, size, size, 3))
    empty, full = encode(ends).mean(axis=(1, 2))
    direction = full - empty
    return 2.0 * ((latent - empty) @ direction) / (direction @ direction) - 1.0


def cell_shares(mask: Float[Array, "n H W 3"], factor: int) -> Float[Array, "n h w"]:
    """Foreground share, 0 to 1, of each latent cell of a -1 / +1 mask image."""
    n, height, width, _ = mask.shape
    cells = mask[..., 0].reshape(n, height // factor, factor, width // factor, factor)
    return 0.5 * (1.0 + cells.mean(axis=(2, 4)))


def balanced_bce_and_dice(
    evidence: Float[Array, "n h w"], share: Float[Array, "n h w"], valid: Bool[Array, "n h w"]
) -> Float[Array, " n"]:
    """Class-balanced cross-entropy plus soft Dice of each mask, over its valid cells."""
    logits = SHARPNESS * evidence
    weight = valid.astype(jnp.float32)
    total = jnp.maximum(weight.sum(axis=(1, 2)), 1.0)
    foreground = (weight * share).sum(axis=(1, 2))
    # an absent class has no foreground to balance: its background counts fully
    ratio = jnp.where(foreground > 0, (total - foreground) / jnp.maximum(foreground, 1e-6), 1.0)
    ratio = jnp.clip(ratio, 1.0, MAX_WEIGHT)[:, None, None]
    error = ratio * share * jax.nn.softplus(-logits) + (1.0 - share) * jax.nn.softplus(logits)
    scale = (weight * (ratio * share + 1.0 - share)).sum(axis=(1, 2))
    bce = (weight * error).sum(axis=(1, 2)) / jnp.maximum(scale, 1e-6)
    soft = weight * jax.nn.sigmoid(logits)
    both = (soft * share).sum(axis=(1, 2))
    dice = 1.0 - (2.0 * both + 1.0) / (soft.sum(axis=(1, 2)) + foreground + 1.0)
    return bce + dice
