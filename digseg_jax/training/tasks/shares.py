# SPDX-License-Identifier: Apache-2.0
"""Metrics of a training batch: shares and losses of a mixture's parts, shares of absent queries."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Batch, Bool, Float, Int
from digseg_jax.data.queries import FOREIGN, HARD_ABSENT, PRESENT


def part_losses(
    squared: Float[Array, "b n"],
    valid: Bool[Array, "b n"],
    part: Int[Array, " b"],
    names: Sequence[str],
) -> dict[str, Array]:
    """Shares of a mixture's parts in a batch, and in the mean loss of its images.

    The loss of a part over any number of steps is the mean of its "part_loss" over that of its "share".

    squared, valid: squared errors of each image's latent cells, and which of them carry a label.
    """
    each = (squared * valid).sum(axis=1) / jnp.maximum(valid.sum(axis=1), 1)
    metrics = {}
    for k, name in enumerate(names):
        metrics[f"share/{name}"] = (part == k).mean()
        metrics[f"part_loss/{name}"] = ((part == k) * each).mean()
    return metrics


def negative_shares(batch: Batch) -> dict[str, Array]:
    """Shares (0..1) of the batch's queries that name absent classes; empty if their kind is unknown."""
    if "query_kind" not in batch:
        return {}
    kind = batch["query_kind"]
    return {
        "negative_share": (kind != PRESENT).mean(),
        "hard_negative_share": (kind == HARD_ABSENT).mean(),
        "foreign_negative_share": (kind == FOREIGN).mean(),
    }
