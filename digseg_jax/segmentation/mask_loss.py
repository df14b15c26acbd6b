# SPDX-License-Identifier: Apache-2.0
"""An auxiliary loss on the mask that a predicted latent stands for, computed without the decoder.

Latents of binary masks lie close to the line from the latent of an empty mask to that of a full one;
the position on it tells a cell's share of foreground. Of a palette, each color has its latent, and the
nearest one tells the class. The loss is not in the paper, whose loss is the plain MSE, and off by
default; in short trainings it keeps masks of rare classes from staying empty.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float, Int

SHARPNESS = 4.0  # logits per unit of evidence, which runs from -1 (empty) to 1 (full)
MAX_WEIGHT = 10.0  # of foreground cells against background cells
MARGIN = 2.0  # logits by which the closest two colors of a palette are told apart
EXACT = jax.lax.Precision.HIGHEST  # products of all bits: TPUs and GPUs would round the factors


def latent_evidence(
    latent: Float[Array, "n h w c"], ends: Float[Array, "2 h w c"]
) -> Float[Array, "n h w"]:
    """Position between `ends`, the latents of an empty (-1) and of a full (1) mask."""
    empty, full = ends.mean(axis=(1, 2))
    direction = full - empty
    along = jnp.matmul(latent - empty, direction, precision=EXACT)
    return 2.0 * along / jnp.matmul(direction, direction, precision=EXACT) - 1.0


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

    # Foreground cells count more where there are fewer of them. An absent class has none to balance:
    # its background counts once.
    total = jnp.maximum(weight.sum(axis=(1, 2)), 1.0)
    foreground = (weight * share).sum(axis=(1, 2))
    ratio = jnp.where(foreground > 0, (total - foreground) / jnp.maximum(foreground, 1e-6), 1.0)
    ratio = jnp.clip(ratio, 1.0, MAX_WEIGHT)[:, None, None]

    # Cross-entropy with soft targets, as a weighted mean over the cells.
    error = ratio * share * jax.nn.softplus(-logits) + (1.0 - share) * jax.nn.softplus(logits)
    scale = (weight * (ratio * share + 1.0 - share)).sum(axis=(1, 2))
    bce = (weight * error).sum(axis=(1, 2)) / jnp.maximum(scale, 1e-6)

    # Dice of the soft mask; the ones keep an empty mask's from being undefined.
    soft = weight * jax.nn.sigmoid(logits)
    both = (soft * share).sum(axis=(1, 2))
    dice = 1.0 - (2.0 * both + 1.0) / (soft.sum(axis=(1, 2)) + foreground + 1.0)
    return bce + dice


def palette_logits(
    latent: Float[Array, "n h w c"], colors: Float[Array, "k c"]
) -> Float[Array, "n h w k"]:
    """Logits of the classes: minus the squared distance to each color's latent.

    colors: the colors' latents.

    The unit is such that the two closest colors are told apart by MARGIN.
    """
    # The latent's own square is left out: it is the same for every class, and a softmax ignores it.
    square = jnp.square(colors).sum(axis=-1)
    distance = square - jnp.matmul(2.0 * latent, colors.T, precision=EXACT)

    # Squared distance of the closest two; of a single color there is none.
    apart = jnp.square(colors[:, None] - colors[None]).sum(axis=-1)
    closest = jnp.where(jnp.eye(len(colors), dtype=bool), jnp.inf, apart).min()
    return -MARGIN * distance / jnp.where(jnp.isfinite(closest), closest, 1.0)


def class_shares(label: Int[Array, "n H W"], factor: int, num_classes: int) -> Float[Array, "n h w k"]:
    """Share of each class, 0 to 1, in each latent cell; ignored pixels belong to no class."""
    n, height, width = label.shape
    cells = label.reshape(n, height // factor, factor, width // factor, factor)
    return jax.nn.one_hot(cells, num_classes).mean(axis=(2, 4))


def balanced_ce_and_dice(
    logits: Float[Array, "n h w k"], share: Float[Array, "n h w k"], valid: Bool[Array, "n h w"]
) -> Float[Array, " n"]:
    """Cross-entropy plus soft Dice of each label map, over its valid cells.

    A class has the weight 1 / sqrt(its share of the image); Dice is the mean over the classes that the
    image shows.
    """
    # Cells of each class, as fractions of cells, and the weights of the classes.
    weight = valid.astype(jnp.float32)[..., None]
    share = share * weight
    cells = share.sum(axis=(1, 2))
    total = jnp.maximum(cells.sum(axis=-1, keepdims=True), 1.0)
    ratio = jnp.sqrt(jnp.clip(total / jnp.maximum(cells, 1e-6), 1.0, MAX_WEIGHT**2))[:, None, None]

    # Cross-entropy as a weighted mean over the cells.
    error = -(ratio * share * jax.nn.log_softmax(logits)).sum(axis=(1, 2, 3))
    ce = error / jnp.maximum((ratio * share).sum(axis=(1, 2, 3)), 1e-6)

    # Dice of each class that is there.
    soft = weight * jax.nn.softmax(logits)
    both, seen = (soft * share).sum(axis=(1, 2)), cells > 0
    dice = 1.0 - (2.0 * both + 1.0) / (soft.sum(axis=(1, 2)) + cells + 1.0)
    return ce + (seen * dice).sum(axis=-1) / jnp.maximum(seen.sum(axis=-1), 1)
